"""Weights and margins from a data row to the loss, and what runs over the steps of `BetaDPO`."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo_wrapper import DPO, IPO, PreferenceBatch, PreferenceCollator, PreferenceDataset, Sigmoid, SimPO
from dpo_wrapper.data import ByteTokenizer, to_example, tokenize_examples
from dpo_wrapper.losses import AOT
from helpers.models import ZOO

ROWS = [
    {"prompt": "a", "chosen": "bc", "rejected": "d", "weight": 2, "margin": 0.5},
    {"prompt": "e", "chosen": "f", "rejected": "gh", "weight": 0.25, "margin": -1},
    {"prompt": "i", "chosen": "j", "rejected": "k", "weight": None},
]


def dataset(rows: list[dict]) -> PreferenceDataset:
    examples = [to_example(row, source="here") for row in rows]
    return PreferenceDataset(
        tokenize_examples(examples, ByteTokenizer(), 32).examples, ByteTokenizer().pad_id
    )


def collated(rows: list[dict]) -> dict:
    of = dataset(rows)
    return PreferenceCollator(of.pad_id)([of[k] for k in range(len(of))])


def test_rows_reach_the_collator():
    batch = collated(ROWS)
    assert batch["pair_weights"].tolist() == [2.0, 0.25, 1.0]
    assert batch["margins"].tolist() == [
        0.5,
        -1.0,
        0.0,
    ]
    without = [{k: v for k, v in row.items() if k != "margin"} for row in ROWS]  # type: ignore[attr-defined]
    assert "margins" not in collated(without) and collated(without)["pair_weights"][0] == 2.0
    bare = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in ROWS]
    assert set(collated(bare)) == {"preferred_seq", "unpreferred_seq", "prompt_mask", "seq_mask"}
    assert len(dataset(bare)[0]) == 3 and len(dataset(ROWS)[0]) == 5


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("weight", -1, "here, field 'weight': the weight should not be negative, but it is the number -1"),
        (
            "weight",
            "2",
            "here, field 'weight': the value should be a finite number, but it is '2': correct it or rename",
        ),
        ("margin", True, "here, field 'margin': the value should be a finite number, but it is true"),
        (
            "margin",
            math.nan,
            "here, field 'margin': the value should be a finite number, but it is (the number nan|a number)",
        ),
    ],
)
def test_columns_that_are_no_numbers(column: str, value, message: str):
    with pytest.raises(ValueError, match=message):
        to_example(ROWS[0] | {column: value}, source="here")


def batch(pairs: int = 4, **columns: Tensor) -> PreferenceBatch:
    generator = torch.Generator().manual_seed(2)
    seqs = tuple(torch.randint(37, (pairs, 8), generator=generator) for _ in range(2))
    prompts = tuple(torch.arange(8).expand(pairs, -1) < 3 for _ in range(2))
    reals = tuple(torch.ones(pairs, 8, dtype=torch.bool) for _ in range(2))
    return PreferenceBatch.from_padded(seqs, prompts, reals, **columns)


def made(loss, **kwargs) -> DPO:
    return DPO(ZOO["xt-rotary"](0).double(), loss=loss, reference=ZOO["xt-rotary"](1).double(), **kwargs)


def test_weights_and_margins_in_dpo():
    dpo = made(Sigmoid(0.3))
    whole = batch()
    parts = [replace(whole, pair_index=whole.pair_index[k : k + 1]) for k in range(4)]
    alone = torch.stack([dpo(part) for part in parts])
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0])
    torch.testing.assert_close(dpo(replace(whole, weights=weights)), (alone * weights).mean())
    # a margin m moves the logit: -log σ(z - m), with z from -log σ(z)
    margins = torch.tensor([0.5, -1.0, 0.0, 2.0])
    z = -torch.log(torch.expm1(alone))
    expected = torch.nn.functional.softplus(margins - z).mean()
    torch.testing.assert_close(dpo(replace(whole, margins=margins)), expected)
    # a pair of weight 0 has no gradient
    only = replace(whole, weights=torch.tensor([0.0, 0.0, 1.0, 0.0]))
    found = torch.autograd.grad(dpo(only), dpo.policy_model.parameters(), allow_unused=True)
    single = torch.autograd.grad(dpo(parts[2]) / 4, dpo.policy_model.parameters(), allow_unused=True)
    for a, b in zip(found, single, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b)


def test_columns_of_invalid_pairs_are_left_out():
    dpo = made(Sigmoid(0.3))
    seqs, reals = torch.randint(37, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    prompt = torch.tensor([[True] * 3 + [False] * 3, [True] * 6])  # the second pair scores nothing
    columns = {"weights": torch.tensor([2.0, 100.0]), "margins": torch.tensor([0.5, 9.0])}
    both = PreferenceBatch.from_padded((seqs, seqs.flip(0)), (prompt, prompt), (reals, reals), **columns)
    first = replace(both, pair_index=both.pair_index[:1], **{name: x[:1] for name, x in columns.items()})
    assert torch.equal(dpo(both), dpo(first))


def test_keywords_of_a_call():
    dpo = made(Sigmoid(0.3))
    chosen, rejected = torch.randint(37, (2, 3, 8))
    prompt = torch.arange(8).expand(3, -1) < 2
    weights = torch.tensor([1.0, 0.0, 2.0])
    loss = dpo(chosen, rejected, prompt, pair_weights=weights, margins=torch.ones(3))
    assert loss.isfinite() and loss != dpo(chosen, rejected, prompt)
    with pytest.raises(TypeError, match="give it alone"):
        dpo(batch(), margins=torch.ones(4))


@pytest.mark.parametrize(
    "columns, kind, message",
    [
        ({"pair_weights": torch.ones(3)}, ValueError, r"pair_weights should have shape \(4,\), one per pair"),
        ({"pair_weights": [1.0] * 4}, TypeError, "pair_weights should be a float tensor, .* a list of 4"),
        ({"pair_weights": torch.ones(4).long()}, TypeError, "but it is torch.int64: use .float"),
        ({"pair_weights": -torch.ones(4)}, ValueError, "pair_weights should be finite and not negative"),
        ({"margins": torch.full((4,), math.inf)}, ValueError, "margins should be finite, but one is not"),
    ],
)
def test_bad_columns_are_refused(columns: dict, kind: type[Exception], message: str):
    seqs, prompt = torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, 5, dtype=torch.bool)
    with pytest.raises(kind, match=message):
        made(Sigmoid())(seqs, seqs, prompt, **columns)


def test_columns_that_cannot_act_are_refused_before_a_forward_pass():
    for loss, columns, message in (
        (IPO(), {"margins": torch.ones(4)}, "margins have no meaning for IPO"),
        (AOT(), {"weights": torch.ones(4)}, "weights of pairs have no meaning for AOT"),
    ):
        dpo = made(loss)
        dpo.policy_model.forward = None
        with pytest.raises(ValueError, match=message):
            dpo(batch(**columns))


@pytest.mark.slow
def test_the_command_trains_on_columns(tmp_path: Path, monkeypatch):
    import json

    from dpo_wrapper.pretrained import PRESETS
    from dpo_wrapper.training.config import TrainConfig
    from dpo_wrapper.training.setup import set_up_training
    from dpo_wrapper.training.train import train

    monkeypatch.setitem(PRESETS, "tiny", {"dim": 16, "depth": 1, "heads": 1})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS * 2))
    more = {"sft_epochs": 0, "epochs": 1, "eval_fraction": 0.0, "cpu": True, "max_length": 16}
    train(TrainConfig(data=data, out=tmp_path / "run", batch_size=3, **more))
    with pytest.raises(ValueError, match="margins have no meaning for IPO"):
        set_up_training(TrainConfig(data=data, out=tmp_path / "other", loss="ipo", **more))


def test_a_reference_is_not_made_for_a_function_that_needs_none():
    def mine(pairs):
        return -pairs.chosen

    assert DPO(ZOO["xt-rotary"](0), loss=mine).ref_model is not None
    mine.needs_reference = False  # type: ignore[attr-defined]
    assert DPO(ZOO["xt-rotary"](0), loss=[(mine, 1.0), (SimPO(), 1.0)]).ref_model is None
