"""`train --plan`: what it counts is what a run does, and it leaves no trace."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo_wrapper import cli
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training import plan
from dpo_wrapper.training.estimate import (
    StageEstimate,
    TokenCounts,
    choose_counted_steps,
    format_estimate,
    format_seconds,
)
from dpo_wrapper.training.flops import ForwardFlops
from dpo_wrapper.training.train import train
from helpers.runs import BUNDLED, SMALL_DECODER, make_config, read_metrics


@pytest.fixture
def small_decoder(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(BUNDLED.read_text(encoding="utf-8").splitlines(keepends=True)[:26]))
    return file


def estimate_run(config, monkeypatch):
    estimates = []
    monkeypatch.setattr(plan, "format_estimate", lambda estimate: estimates.append(estimate))
    plan.plan_run(config)
    return estimates


def test_what_is_counted_is_what_a_run_does(tmp_path, rows, small_decoder, monkeypatch, capsys):
    config = make_config(rows, tmp_path / "out", epochs=2, save_steps=0, samples=0, keep_best=True)
    sft, dpo = estimate_run(config, monkeypatch)
    assert not config.out.exists()
    train(config)
    for name, estimate, epochs in (("sft", sft, 1), ("dpo", dpo, 2)):
        log = [r for r in read_metrics(config.out) if r["stage"] == name and r["part"] == "step"]
        assert estimate.seconds["steps"] == pytest.approx(estimate.step_seconds * len(log))
        for kind in ("unique", "padded"):  # which step has which rows differs between epochs
            total = sum(record[f"tokens/{kind}"] for record in log) / epochs
            assert getattr(estimate.tokens, kind) == pytest.approx(total, rel=0.1)
    assert dpo.memory["gradients"] == pytest.approx(dpo.memory["weights"], rel=0.01)  # but for buffers
    assert dpo.memory["optimizer"] == pytest.approx(2 * dpo.memory["gradients"], rel=0.01)
    assert dpo.checkpoint_bytes == pytest.approx(4 * dpo.memory["gradients"], rel=0.01)  # and the best
    assert dpo.memory["reference"] == dpo.memory["weights"]  # a copy
    assert sft.memory["reference"] == 0
    assert dpo.seconds.keys() == {"steps", "reference", "evaluation"}


def test_the_plan_is_printed_and_nothing_is_written(tmp_path, rows, small_decoder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "--data", str(rows), "--plan", "--cpu", "--sft-epochs", "0", "--epochs", "1"])
    printed = capsys.readouterr().out
    for part in (r"dpo: 2\d train", "tokens of an epoch", "TFLOP", "memory", "a checkpoint", "time"):
        assert re.search(part, printed), part
    assert list(tmp_path.iterdir()) == [rows]


def test_a_stage_without_epochs_is_not_planned(tmp_path, rows, small_decoder, monkeypatch):
    estimates = estimate_run(make_config(rows, tmp_path / "out", epochs=0), monkeypatch)
    assert [one.seconds.keys() for one in estimates] == [{"steps", "evaluation"}]  # of sft: no reference


def tiny_llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, attn_implementation="eager", **sizes, **options))


@pytest.mark.parametrize("is_tied", [False, True])
def test_operations_are_those_of_torch(is_tied):
    model, length = tiny_llama(num_key_value_heads=2, tie_word_embeddings=is_tied), 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(0, 50, (1, length)))
    forward = ForwardFlops.of_model(model)
    attended = length * length  # eager attention computes the upper half too
    expected = counter.get_total_flops()
    # rotary positions are a product of a column and a row
    assert (
        forward.per_token * length + forward.per_scored_token * length + forward.per_attended_pair * attended
        == pytest.approx(expected, rel=0.01)
    )
    assert forward.trained_share == 1 and forward.trains_head


def test_operations_of_training_follow_what_trains():
    model = tiny_llama(tie_word_embeddings=False)
    whole = ForwardFlops.of_model(model)
    tokens = {"tokens": 10, "scored": 5, "attended": 50, "has_reference": True}
    model.lm_head.weight.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    frozen = ForwardFlops.of_model(model)
    assert frozen.trained_share == pytest.approx(1 / 3) and not frozen.trains_head
    assert frozen.count(**tokens) < whole.count(**tokens)
    assert whole.count(**tokens) > whole.count(**(tokens | {"has_reference": False}))
    # policy, what flows back, gradients of weights, and the reference
    no_attention = replace(whole, per_attended_pair=0.0, per_scored_token=0.0)
    assert no_attention.count(**tokens) == 4 * whole.per_token * 10


def test_experts_that_a_token_does_not_meet_are_not_counted():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    few, many = (
        ForwardFlops.of_model(
            MixtralForCausalLM(
                MixtralConfig(vocab_size=50, num_local_experts=n, num_experts_per_tok=2, **sizes)
            )
        )
        for n in (2, 8)
    )
    router = 2 * 16 * (8 - 2)
    assert many.per_token == pytest.approx(few.per_token + router)


def test_steps_are_spread_over_the_epoch():
    assert choose_counted_steps(5) == [0, 1, 2, 3, 4]
    steps = choose_counted_steps(1000)
    assert len(steps) == 64 and steps[0] == 0 and steps[-1] >= 980 and len(set(steps)) == 64


def test_the_estimate_reads_well():
    estimate = StageEstimate(
        tokens=TokenCounts(1_203_000, 604_000, 412_000, 100_000, 0),
        flops=3.4e14,
        memory={"weights": 5.4e8, "reference": 0, "activations": 2.46e9},
        checkpoint_bytes=2.7e7,
        step_seconds=3.84,
        seconds={"steps": 1947.0, "reference": 70.0},
    )
    assert format_estimate(estimate) == (
        "  tokens of an epoch  1,203,000 padded, 604,000 real, 412,000 unique\n"
        "  computation         340 TFLOP in the first epoch\n"
        "  memory              3.00 GB (weights 0.54, activations 2.46)\n"
        "  a checkpoint        27 MB\n"
        "  time                34 min (steps 32 min, reference 70 s), 3.84 s a step, the reference known"
    )
    seconds = (4.4, 99, 100, 780, 7200)
    assert [format_seconds(s) for s in seconds] == ["4 s", "99 s", "1.7 min", "13 min", "2 h 0 min"]
