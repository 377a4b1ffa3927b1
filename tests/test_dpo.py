"""`DPO` against the float64 oracle: log-probs, loss and every gradient, for every family of models."""

import copy
import random

import pytest
import torch
from torch import Generator, nn

from dpo_wrapper import DPO, IPO, SFT, Loss, Sigmoid, SigmoidNorm, SimPO, sequence_log_probs
from helpers.batches import random_batch, repad
from helpers.dpo_calls import LN2, arguments, nudged
from helpers.marks import mark_slow_except
from helpers.models import ZOO
from helpers.oracle import (
    ExactFloat64,
    dpo_oracle,
    ipo_loss,
    sft_oracle,
    sigmoid_loss,
    sigmoid_norm_loss,
    simpo_loss,
    to_float64,
)

# the arithmetic of these goes through a log of clamped probabilities; the rest agrees to rounding
LOOSE = {"xt-mixture": 1e-7}
FAST = ["xt-absolute", "xt-alibi", "xt-tied", "xt-dropout", "hf-llama", "hf-gpt2", "plain-gru", "plain-tied"]
"""A few of each library, for tests of another kind than the comparison with the oracle."""


def made(name: str, **kwargs) -> tuple[DPO, nn.Module]:
    """A float64 `DPO` whose policy has moved, and an independently built reference."""
    policy, reference = (to_float64(ZOO[name](0)) for _ in range(2))
    dpo = DPO(policy, **kwargs)
    nudged(dpo.policy_model)
    return dpo, reference


@pytest.mark.pitfall(2)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_loss_log_probs_and_gradients_equal_the_oracle(name, seed):
    dpo, reference = made(name, beta=0.3)
    case = random_batch(Generator().manual_seed(seed + sum(map(ord, name))))
    tolerance = LOOSE.get(name, 1e-9)

    expected = dpo_oracle(
        dpo.policy_model,
        reference,
        case.preferred_seq,
        case.unpreferred_seq,
        case.prompt_masks,
        case.seq_masks,
        sigmoid_loss(0.3),
    )
    parameters = [p for p in dpo.policy_model.parameters() if p.requires_grad]
    expected_grads = torch.autograd.grad(expected["loss"], parameters, allow_unused=True)

    with ExactFloat64():
        loss, metrics = dpo(**arguments(case), return_metrics=True)
    loss.backward()

    assert abs(loss - expected["loss"]) < tolerance
    valid = expected["valid"]
    assert metrics["pairs/valid"] == valid.sum()
    if valid.any():
        for ours, theirs in (
            ("logps/chosen", "policy_preferred"),
            ("logps/rejected", "policy_unpreferred"),
            ("logps/ref_chosen", "reference_preferred"),
            ("logps/ref_rejected", "reference_unpreferred"),
            ("length/chosen", "count_preferred"),
            ("length/rejected", "count_unpreferred"),
        ):
            assert abs(metrics[ours] - expected[theirs][valid].double().mean()) < tolerance * 10
    for p, grad in zip(parameters, expected_grads, strict=True):
        ours = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(ours, torch.zeros_like(p) if grad is None else grad, atol=tolerance, rtol=1e-7)


@pytest.mark.parametrize(
    "loss, oracle",
    [
        (Sigmoid(0.7), sigmoid_loss(0.7)),
        (Sigmoid(0.7, label_smoothing=0.2), sigmoid_loss(0.7, 0.2)),
        (SigmoidNorm(2.0), sigmoid_norm_loss(2.0)),
        (IPO(0.4), ipo_loss(0.4)),
        (SimPO(2.5, 0.8), simpo_loss(2.5, 0.8)),
    ],
    ids=lambda value: str(value) if isinstance(value, Loss) else "oracle",
)
def test_every_loss_equals_the_oracle_end_to_end(loss, oracle):
    dpo, reference = made("xt-tied", loss=loss)
    for seed in range(3):
        case = random_batch(Generator().manual_seed(seed), b=4)
        sides = (case.preferred_seq, case.unpreferred_seq, case.prompt_masks, case.seq_masks)
        expected = dpo_oracle(dpo.policy_model, reference, *sides, oracle)
        with ExactFloat64():
            assert abs(dpo(**arguments(case)) - expected["loss"]) < 1e-9


def test_weighted_losses_add_up():
    dpo, reference = made("xt-rotary", loss=[(Sigmoid(0.2), 0.8), (SFT(), 1.5)])
    case = random_batch(Generator().manual_seed(5), b=5)
    sides = (case.preferred_seq, case.unpreferred_seq, case.prompt_masks, case.seq_masks)
    expected = dpo_oracle(dpo.policy_model, reference, *sides, sigmoid_loss(0.2))
    with ExactFloat64():
        total = dpo(**arguments(case))
    assert abs(total - (0.8 * expected["loss"] + 1.5 * sft_oracle(expected))) < 1e-9


@pytest.mark.parametrize("name", mark_slow_except(FAST, ZOO))
def test_left_right_and_middle_padding_give_the_same_numbers(name):
    dpo = DPO(ZOO[name](0))
    nudged(dpo.policy_model)
    case = random_batch(Generator().manual_seed(11), b=4)
    losses = [dpo(**arguments(repad(case, side))) for side in ("left", "right", "middle")]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("filler", [-100, 10**6])
def test_what_stands_in_padded_places_does_not_matter(filler):
    dpo = DPO(ZOO["xt-absolute"](0))
    case = random_batch(Generator().manual_seed(2), b=4)
    same = [seq.masked_fill(~real, filler) for seq, real in zip(*sides_of(case), strict=True)]
    assert dpo(**arguments(case)) == dpo(*same, case.prompt_masks, case.seq_masks)


def sides_of(case):
    return (case.preferred_seq, case.unpreferred_seq), case.seq_masks


@pytest.mark.parametrize("name", mark_slow_except(FAST, ZOO))
def test_a_fresh_dpo_starts_at_ln_2(name):
    dpo = DPO(ZOO[name](0).train()).train()
    case = random_batch(Generator().manual_seed(1), b=4, odd=0)
    loss, metrics = dpo(**arguments(case), return_metrics=True)
    assert abs(loss - LN2) < 1e-6
    assert metrics["rewards/accuracies"] == 0.5


def test_dropout_stays_on_when_asked_for():
    dpo = DPO(ZOO["xt-dropout"](0).train(), disable_dropout=False)
    case = random_batch(Generator().manual_seed(1), b=4, odd=0)
    torch.manual_seed(0), random.seed(0)
    losses = [dpo(**arguments(case)).item() for _ in range(4)]
    assert len(set(losses)) > 1 and max(abs(loss - LN2) for loss in losses) > 1e-4


@pytest.mark.parametrize("share", [False, True])
def test_one_forward_for_both_sides_of_the_policy_and_one_for_the_reference(share):
    dpo = DPO(ZOO["xt-rotary"](0), share_prefix=share)
    case = random_batch(Generator().manual_seed(0), b=3, odd=0)
    calls = []
    for model in (dpo.policy_model, dpo.ref_model):
        model.attn_layers.register_forward_hook(
            lambda module, args, out: calls.append((tuple(args[0].shape[:2]), torch.is_grad_enabled()))
        )
    dpo(**arguments(case))  # the first call also looks at the models
    calls.clear()
    metrics = dpo(**arguments(case), return_metrics=True)[1]
    unique, padded = int(metrics["tokens/unique"]), int(metrics["tokens/padded"])
    shape = (1, unique) if share else (6, padded // 6)
    assert sorted(calls) == [(shape, False), (shape, True)]


@pytest.mark.parametrize(
    "name",
    mark_slow_except(["xt-rotary", "hf-gemma2"], ["xt-rotary", "hf-llama", "hf-gpt2", "hf-gemma2", "hf-opt"]),
)
def test_only_scored_positions_reach_the_head(name, monkeypatch):
    dpo = DPO(ZOO[name](0))
    case = random_batch(Generator().manual_seed(0), b=3, odd=0)
    dpo(**arguments(case))
    assert dpo.policy.probe.head_applies
    model = dpo.policy_model
    head = model.to_logits if name.startswith("xt") else model.get_output_embeddings()
    own = nn.Linear.forward

    def forward(module, x):
        assert module is not head, "the model's own head was called"
        return own(module, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)  # with one of its own, the model would be probed again
    dpo(**arguments(case)).backward()
    assert head.weight.grad is not None


def test_prompt_mask_as_one_tensor_serves_both_sides():
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0))
    generator = Generator().manual_seed(0)
    chosen, rejected = (torch.randint(0, 37, (2, n), generator=generator) for n in (9, 6))
    mask = torch.arange(9).expand(2, -1) < 3
    assert dpo(chosen, rejected, mask) == dpo(chosen, rejected, (mask, mask[:, :6]))


def test_pad_id_marks_leading_and_trailing_runs_only():
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0), pad_id=0)
    chosen = torch.tensor([[0, 0, 5, 0, 7, 8, 0]])  # the 0 between 5 and 7 is a token
    rejected = torch.tensor([[5, 0, 9]])
    nothing = torch.zeros(1, 7, dtype=torch.bool)
    explicit = dpo(
        chosen,
        rejected,
        nothing,
        preferred_seq_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 0]]).bool(),
        unpreferred_seq_mask=torch.ones(1, 3).bool(),
    )
    assert dpo(chosen, rejected, nothing) == explicit


def test_given_reference_log_probs_replace_the_reference():
    """In float64 throughout: the sides are scored apart, so that rows of attention have other lengths, and
    torch's float32 softmax rounds rows shorter than one vector register (8 or 16 columns) differently."""
    dpo, _ = made("xt-rotary")
    case = random_batch(Generator().manual_seed(4), b=3, odd=0)
    with ExactFloat64():
        loss, metrics = dpo(**arguments(case), return_metrics=True)
        sums = [
            sequence_log_probs(dpo.ref_model, seq, ~prompt, real)
            for seq, prompt, real in zip(sides_of(case)[0], case.prompt_masks, case.seq_masks, strict=True)
        ]
        assert sums[0].requires_grad is False
        calls = []
        dpo.ref_model.attn_layers.register_forward_hook(lambda *_: calls.append(1))
        assert abs(dpo(**arguments(case), ref_log_probs=tuple(sums)) - loss) < 1e-12
    assert not calls
    assert abs(metrics["logps/ref_chosen"] - sums[0].mean()) < 1e-9


def test_without_a_reference_the_loss_is_the_simplified_form():
    dpo, _ = made("xt-rotary", reference="none", beta=0.5)
    assert dpo.ref_model is None
    case = random_batch(Generator().manual_seed(6), b=3)
    sides = (case.preferred_seq, case.unpreferred_seq, case.prompt_masks, case.seq_masks)
    with ExactFloat64():
        loss, metrics = dpo(**arguments(case), return_metrics=True)
    assert abs(loss - dpo_oracle(dpo.policy_model, None, *sides, sigmoid_loss(0.5))["loss"]) < 1e-9
    assert "logps/ref_chosen" not in metrics


def test_metrics_by_hand():
    """Known probabilities: p_w = ln 0.5 and r_w = ln 0.25, p_l = ln 0.1 and r_l = ln 0.4."""

    class Table(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.log_p = nn.Parameter(torch.tensor(rows).log())

        def forward(self, ids):
            return self.log_p[ids]

    policy = Table([[0.5, 0.1, 0.4], [1 / 3] * 3, [1 / 3] * 3])
    reference = Table([[0.25, 0.4, 0.35], [1 / 3] * 3, [1 / 3] * 3])
    dpo = DPO(policy, reference=reference, beta=0.1)
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    loss, metrics = dpo(torch.tensor([[0, 0]]), torch.tensor([[0, 1]]), nothing, return_metrics=True)
    # a = ln 2, b = -ln 4, a - b = ln 8
    expected = {
        "loss": -torch.sigmoid(torch.tensor(0.1 * 2.0794415)).log().item(),
        "rewards/chosen": 0.06931472,
        "rewards/rejected": -0.13862944,
        "rewards/margins": 0.20794415,
        "rewards/accuracies": 1.0,
        "logps/chosen": -0.6931472,
        "logps/rejected": -2.3025851,
        "logps/ref_chosen": -1.3862944,
        "logps/ref_rejected": -0.9162907,
        "kl/chosen": 0.6931472,
        "length/chosen": 1.0,
        "length/rejected": 1.0,
        "pairs/valid": 1.0,
        "tokens/unique": 1.0,  # both sides are the input token 0, shared; the last token is no input
        "tokens/padded": 2.0,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-5), name
        assert not metrics[name].requires_grad
    assert loss.item() == metrics["loss"].item()


def test_deepcopy_of_the_module_trains_on_its_own():
    dpo = DPO(ZOO["xt-rotary"](0))
    case = random_batch(Generator().manual_seed(1), b=2, odd=0)
    twin = copy.deepcopy(dpo)
    twin(**arguments(case)).backward()
    assert all(p.grad is None for p in dpo.parameters())
    assert any(p.grad is not None for p in twin.policy_model.parameters())


def test_explain_says_which_paths_are_in_use():
    case = random_batch(Generator().manual_seed(1), b=2, odd=0)
    dpo = DPO(ZOO["xt-rotary"](0))
    assert "not probed before the first call" in dpo.explain()
    dpo(**arguments(case))
    policy, reference = dpo.explain().splitlines()
    own = "by the model's own attention along each path, for it is not plain softmax attention (attn_flash"
    assert policy.startswith(f"policy: x-transformers model; shared prefixes are computed once, {own}")
    assert policy.endswith("the head is applied to scored positions alone")
    assert reference.startswith("reference: a frozen model; x-transformers model; shared prefixes")

    plain = DPO(ZOO["plain-gru"](0), reference="none")
    plain(**arguments(case))
    policy, reference = plain.explain().splitlines()
    assert "sequences are padded, for the attention of a plain module cannot be reached" in policy
    assert policy.endswith("all logits are computed, for the head of a plain module cannot be reached")
    assert reference == "reference: none"
    off = DPO(ZOO["xt-rotary"](0), share_prefix=False)
    off(**arguments(case))
    assert "padded, for share_prefix is False" in off.explain()
