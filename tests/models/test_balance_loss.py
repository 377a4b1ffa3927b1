"""The loss that balances experts is transformers' `aux_loss`, over a prefix tree too, with all gradients."""

import copy
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO, PreferenceBatch, RankedBatch, UnpairedBatch
from dpo_wrapper.losses import KTO, PlackettLuce
from helpers.adapters import lora
from helpers.batches import Case
from helpers.dpo_calls import arguments, nudged
from helpers.kernels import scorers, shares_prefix
from helpers.marks import mark_slow_except
from helpers.models import VOCAB, hf_llama, plain_gru, xt_rotary
from helpers.oracle import ExactFloat64, to_float64
from helpers.shareable_models import EXPERTS, Make, batch_with_shared_prefixes, hf

LOCAL_EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
FAMILIES: dict[str, Make] = {
    "mixtral": hf("Mixtral", **LOCAL_EXPERTS),
    "qwen2-moe": hf("Qwen2Moe", shared_expert_intermediate_size=8, **EXPERTS),
    "qwen3-moe": hf("Qwen3Moe", head_dim=8, mlp_only_layers=[0], **EXPERTS),  # its first layer has no experts
    "gpt-oss": hf("GptOss", "eager", head_dim=8, **LOCAL_EXPERTS),
}
CASE = batch_with_shared_prefixes()
COEF = 0.7


def pairs(count: int, seed: int = 0) -> list[tuple[list[int], ...]]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(2, 6, (), generator=generator))
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    return [(ids(), ids(), ids()) for _ in range(count)]


def batch_of(rows: list[tuple[list[int], ...]]) -> PreferenceBatch:
    return PreferenceBatch.from_lists(*map(list, zip(*rows, strict=True)))


def make_dpo(make: Make, share_prefix: bool, coef: float | None = COEF, **options: Any) -> DPO:
    policy, reference = to_float64(make(0)), to_float64(make(0))
    options = dict(reference=reference, share_prefix=share_prefix) | options
    dpo = DPO(nudged(policy, 0.05), router_aux_loss_coef=coef, **options).train()
    # probed here, outside of `ExactFloat64`, in which experts round a token differently among other tokens
    for scorer in scorers(dpo):
        scorer.check(batch_of(pairs(1)).sequences)
    return dpo


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = dict(allow_unused=True, materialize_grads=True, retain_graph=True)
    return list(torch.autograd.grad(loss, parameters, **options))


def inputs_of(case: Case) -> tuple[Tensor, Tensor]:
    """All sequences as transformers takes them: ids and attention mask, without each one's last token."""
    seqs = torch.cat([case.preferred_seq, case.unpreferred_seq])
    reals = torch.cat([torch.as_tensor(mask) for mask in case.seq_masks])
    assert (reals.long().diff() <= 0).all()  # padding stands on the right
    return seqs[:, :-1], reals[:, 1:].long()


def transformers_aux_loss(model: nn.Module, case: Case = CASE) -> Tensor:
    ids, mask = inputs_of(case)
    model.eval()  # without dropout
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss


def assert_all_close(results: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for result, value in zip(results, expected, strict=True):
        assert torch.allclose(result, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "family, share_prefix",
    mark_slow_except(
        [("mixtral", False), ("mixtral", True), ("qwen3-moe", True), ("gpt-oss", True)],
        product(FAMILIES, [False, True]),
    ),
)
def test_loss_and_gradients_are_those_that_transformers_adds(family, share_prefix):
    plain, dpo = (make_dpo(FAMILIES[family], share_prefix, coef) for coef in (0.0, COEF))
    with ExactFloat64():
        plain_loss, plain_metrics = plain(**arguments(CASE), return_metrics=True)
        aux_loss = transformers_aux_loss(plain.policy_model)
        expected_loss = plain_loss + COEF * aux_loss
        expected = gradients(expected_loss, plain.policy_model)
        without = gradients(plain_loss, plain.policy_model)
        loss, metrics = dpo(**arguments(CASE), return_metrics=True)
        results = gradients(loss, dpo.policy_model)
    assert shares_prefix(dpo) == share_prefix
    assert_all_close([loss, metrics["aux_loss"]], [expected_loss, aux_loss])
    assert not metrics["aux_loss"].requires_grad
    assert "aux_loss" not in plain_metrics
    assert_all_close([metrics[name] for name in plain_metrics], list(plain_metrics.values()))
    assert_all_close(results, expected)
    difference = sum((one - other).norm() for one, other in zip(expected, without, strict=True))
    assert difference > 0.1 * sum(grad.norm() for grad in without)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_adapters_and_trained_heads(share_prefix):
    def make(seed: int) -> nn.Module:
        model = lora(FAMILIES["mixtral"](seed), modules_to_save=["lm_head"])
        return nudged(model, 0.02)

    plain, dpo = (make_dpo(make, share_prefix, coef) for coef in (0.0, COEF))
    with ExactFloat64():
        loss = dpo(**arguments(CASE))
        expected = plain(**arguments(CASE)) + COEF * transformers_aux_loss(plain.policy_model)
        assert_all_close(
            [loss, *gradients(loss, dpo.policy_model)], [expected, *gradients(expected, plain.policy_model)]
        )


@pytest.mark.filterwarnings("ignore:all logits")
def test_all_logits_and_copies():
    dpo = make_dpo(FAMILIES["mixtral"], share_prefix=False)
    with ExactFloat64():
        expected = dpo(**arguments(CASE))
        twin = copy.deepcopy(dpo)
        assert twin(**arguments(CASE)) == expected
        twin.policy_model.register_forward_hook(lambda *_: None)
        loss = twin(**arguments(CASE))
        assert "all logits" in twin.explain()
        assert_all_close(gradients(loss, twin.policy_model), gradients(expected, dpo.policy_model))


@pytest.mark.parametrize("share_prefix", [False, True])
def test_checkpointed_layers(share_prefix):
    dpo = make_dpo(FAMILIES["mixtral"], share_prefix)
    expected = gradients(dpo(**arguments(CASE)), dpo.policy_model)
    dpo.policy_model.gradient_checkpointing_enable({"use_reentrant": False})
    dpo(**arguments(CASE)).backward()
    assert_all_close([p.grad for p in dpo.policy_model.parameters()], expected, 1e-6)
    dpo.policy_model.gradient_checkpointing_enable({"use_reentrant": True})
    dpo.policy_model.enable_input_require_grads()
    with pytest.raises(ValueError, match="the router logits should have gradients, but they have none"):
        dpo(**arguments(CASE))


def test_the_model_s_own_coefficient():
    def make(seed: int, asks: bool = True) -> nn.Module:
        own = dict(output_router_logits=asks, router_aux_loss_coef=COEF)
        return hf("Mixtral", **LOCAL_EXPERTS, **own)(seed)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = {
            name: make_dpo(maker, True, coef)(**arguments(CASE))
            for name, maker, coef in (
                ("own", make, None),
                ("given", make, COEF),
                ("off", make, 0.0),
                ("not asked", lambda seed: make(seed, False), None),
            )
        }
    assert losses["own"] == losses["given"] != losses["off"] == losses["not asked"]


def test_evaluation_and_the_reference_have_none():
    dpo = make_dpo(FAMILIES["mixtral"], True)
    plain = make_dpo(FAMILIES["mixtral"], True, coef=0.0)
    with torch.no_grad():
        loss, metrics = dpo(**arguments(CASE), return_metrics=True)
        expected = plain(**arguments(CASE))
    assert loss == expected and "aux_loss" not in metrics


def test_a_policy_that_is_assigned_keeps_the_option():
    dpo = make_dpo(FAMILIES["mixtral"], True)
    expected = dpo(**arguments(CASE))
    dpo.policy_model = copy.deepcopy(dpo.policy_model)
    assert torch.equal(dpo(**arguments(CASE)), expected)
    with pytest.raises(ValueError, match="transformers has none for LlamaForCausalLM"):
        dpo.policy_model = to_float64(hf_llama(0))


@pytest.mark.parametrize("share_prefix", [False, True])
def test_micro_batches_are_weighted_by_their_share_of_the_pairs(share_prefix):
    rows = pairs(5)
    plain, dpo = (make_dpo(FAMILIES["mixtral"], share_prefix, coef) for coef in (0.0, COEF))
    with ExactFloat64():
        plain_loss = plain(batch_of(rows))
        parts = [batch_of(rows[:2]), batch_of(rows[2:])]
        aux_losses = [dpo(part, return_metrics=True)[1]["aux_loss"] for part in parts]
        total = sum(dpo(part) for part in dpo.normalize_over_step(parts))
        expected = plain_loss + COEF * (2 * aux_losses[0] + 3 * aux_losses[1]) / 5
    assert_all_close([total], [expected])


@pytest.mark.parametrize("share_prefix", [False, True])
def test_without_a_valid_pair_loss_and_gradients_are_zero(share_prefix):
    dpo = make_dpo(FAMILIES["mixtral"], share_prefix)
    for chosen, rejected in (([], []), ([3], [])):
        loss, metrics = dpo(batch_of([([1, 2], chosen, rejected)]), return_metrics=True)
        assert loss == 0 and metrics["aux_loss"].isfinite()
        assert all(grad.count_nonzero() == 0 for grad in gradients(loss, dpo.policy_model))


@pytest.mark.parametrize("loss", [KTO(), PlackettLuce()])
def test_lists_and_single_completions(loss):
    prompts, completions = [[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]]
    if isinstance(loss, KTO):
        batch: Any = UnpairedBatch.from_lists(prompts, completions, labels=[True, False])
    else:
        batch = RankedBatch.from_lists(prompts, [[each, [11], [12, 13]] for each in completions])
    results = []
    for share_prefix in (False, True):
        dpo = make_dpo(FAMILIES["mixtral"], share_prefix, loss=loss)
        with ExactFloat64():
            value, metrics = dpo(batch, return_metrics=True)
            assert metrics["aux_loss"] > 0.5
            results.append([value, metrics["aux_loss"], *gradients(value, dpo.policy_model)])
    assert_all_close(*results)


@pytest.mark.parametrize("make", [xt_rotary, plain_gru, hf_llama, hf("Doge", is_moe=True)])
def test_models_without_such_a_loss_refuse_the_option(make):
    with pytest.raises(ValueError, match="router_aux_loss_coef should be 0 or None where no loss balances"):
        DPO(make(0), router_aux_loss_coef=0.1)
    DPO(make(0), router_aux_loss_coef=0)


def test_a_mixture_of_dense_layers_alone_refuses_the_option():
    dpo = DPO(hf("Qwen3Moe", head_dim=8, mlp_only_layers=[0, 1], **EXPERTS)(0), router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="the model should give router logits, but no layer does"):
        dpo(**arguments(CASE))


@pytest.mark.parametrize("coef", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_a_coefficient_that_is_none_is_refused(coef):
    with pytest.raises(ValueError, match="router_aux_loss_coef should be a number from 0, or None"):
        DPO(FAMILIES["mixtral"](0), router_aux_loss_coef=coef)
