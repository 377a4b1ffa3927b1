"""Lower layers that policy and reference have in common run once, and nothing else changes by it."""

import contextlib
import threading
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO, RankedBatch, UnpairedBatch
from dpo_wrapper.losses import KTO, PairLogProbs, PlackettLuce
from dpo_wrapper.models import language_model
from dpo_wrapper.models.lower_layers import LayerRecord
from dpo_wrapper.prefix_tree import PrefixSharingError
from helpers.dpo_calls import arguments, nudged
from helpers.lower_layers import (
    FAMILIES,
    ONCE,
    XT,
    assert_same_results,
    count_runs,
    freeze_lower,
    move_policy,
    upper_lora,
    whole_passes,
)
from helpers.marks import mark_slow_except
from helpers.ranked_batches import lists_of_ids, rows_of_ids
from helpers.shareable_models import CASES, assert_close, loss_and_gradients


@pytest.mark.parametrize("share_prefix", ["auto", False])
@pytest.mark.parametrize("name", mark_slow_except(["llama", "gemma3", "mixtral"], FAMILIES))
@pytest.mark.filterwarnings("ignore:prefixes are not shared")
def test_an_adapter_in_upper_layers(name, share_prefix):
    dpo = move_policy(DPO(upper_lora(FAMILIES[name]), share_prefix=share_prefix))
    assert dpo.ref_model is None
    last = 2 if name == "lfm2" else 1  # layer 2 of which is a convolution
    assert_same_results(dpo, expected=f"layers 0 to {last} of 4 are computed once for both")


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_loaded_adapter_whose_reference_is_a_copy(share_prefix):
    policy = upper_lora(FAMILIES["llama"])
    nudged(nn.ParameterList([p for p in policy.parameters() if p.requires_grad]), 0.1)
    dpo = move_policy(DPO(policy, share_prefix=share_prefix))
    assert dpo.ref_model is not None
    assert_same_results(dpo, expected="layers 0 to 1 of 4")


@pytest.mark.parametrize("name", mark_slow_except(["qwen2"], ["llama", "qwen2", "gemma2"]))
def test_a_full_fine_tune_of_upper_layers(name):
    frozen = ("model.embed_tokens", "model.layers.0.", "model.layers.1.", "model.layers.2.", "lm_head")
    dpo = move_policy(DPO(freeze_lower(FAMILIES[name](0), frozen)))
    assert_same_results(dpo, expected="layers 0 to 2 of 4")


@pytest.mark.parametrize("share_prefix", ["auto", False])
@pytest.mark.parametrize("name", mark_slow_except(["rotary", "streams"], XT))
def test_upper_blocks_of_x_transformers(name, share_prefix):
    frozen = ("token_emb", "pos_emb", "attn_layers.stream", *(f"attn_layers.layers.{k}." for k in range(3)))
    dpo = move_policy(DPO(freeze_lower(XT[name](0), frozen), share_prefix=share_prefix))
    assert_same_results(dpo, expected="blocks 0 to 2 of 4")


def test_frozen_weights_of_zeros():
    """What stands in for them in other trials would not be the reference's."""
    policy = FAMILIES["qwen2"](0)
    nn.init.zeros_(policy.model.layers[0].self_attn.q_proj.bias)
    dpo = move_policy(DPO(freeze_lower(policy, ("model.embed_tokens", "model.layers.0."))))
    assert_same_results(dpo, expected="layer 0 of 4 is computed once for both")


def test_a_hook_below_that_comes_after_the_first_call():
    model = FAMILIES["llama"](0)
    dpo = move_policy(DPO(freeze_lower(model, ("model.embed_tokens", "model.layers.0."))))
    assert_same_results(dpo, expected="layer 0 of 4 is computed once for both")
    model.model.embed_tokens.register_forward_hook(lambda _module, _ids, output: 1.5 * output)
    assert_same_results(dpo, expected="no layer is computed for both at once")


def test_a_trained_head_alone():
    model = FAMILIES["llama"](0)
    dpo = move_policy(DPO(freeze_lower(model, ("model.",))))
    assert_same_results(dpo, expected="layers 0 to 3 of 4")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    policy = upper_lora(FAMILIES["llama"]).train()
    policy.enable_input_require_grads()
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
    dpo = move_policy(DPO(policy))
    results = {}
    for context in (contextlib.nullcontext(), whole_passes()):
        with context:
            policy.zero_grad()
            dpo(**arguments(CASES[1])).backward()  # reentrant checkpoints take no torch.autograd.grad
        gradients = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
        results[len(results)] = gradients
        assert all(gradient.any() for gradient in gradients)
    assert ONCE in dpo.explain()
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [dict(wpo=True), dict(ld_alpha=0.3)])
def test_options_of_dpo(options):
    dpo = move_policy(DPO(upper_lora(FAMILIES["llama"]), **options))
    for case in CASES:
        assert_same_results(dpo, case)


@pytest.mark.parametrize("kind", ["ranked", "unpaired"])
def test_other_batches(kind):
    policy = upper_lora(FAMILIES["llama"])
    if kind == "ranked":
        batch, loss = RankedBatch.from_lists(*lists_of_ids()), PlackettLuce()
    else:
        batch, loss = UnpairedBatch.from_lists(*rows_of_ids()), KTO()
    dpo = move_policy(DPO(policy, loss=loss))
    runs = count_runs(policy)
    results: list[tuple[Tensor, ...]] = []
    for context in (contextlib.nullcontext(), contextlib.nullcontext(), whole_passes()):
        with context:
            runs.clear()
            value = dpo(batch)
            counts = [runs.count(k) for k in range(4)]
            trained = [p for p in policy.parameters() if p.requires_grad]
            results.append((value.detach(), *torch.autograd.grad(value, trained)))
            passes = 1 if kind == "ranked" else 2  # for KTO those of its KL estimate too
            assert len(results) != 2 or counts == [passes, passes, 2 * passes, 2 * passes]
    torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[1], results[2], rtol=1e-12, atol=1e-12)


def test_lower_layers_run_in_the_pass_of_the_reference_alone():
    policy = upper_lora(FAMILIES["llama"])
    dpo = DPO(policy, cache_ref_log_probs=True)
    dpo(**arguments(CASES[0]))  # the trial runs all layers
    runs = count_runs(policy)
    dpo(**arguments(CASES[1])).backward()
    assert [runs.count(k) for k in range(4)] == [1, 1, 2, 2]
    runs.clear()
    dpo(**arguments(CASES[1])).backward()  # the reference is known, so the policy's pass is whole
    assert [runs.count(k) for k in range(4)] == [1, 1, 1, 1]
    runs.clear()
    known = (torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    dpo(**arguments(CASES[1]), ref_log_probs=known)
    with torch.no_grad():
        dpo(**arguments(CASES[2]))
    assert [runs.count(k) for k in range(4)] == [2, 2, 3, 3]


def test_micro_batches_and_evaluation_in_turns():
    dpo = move_policy(DPO(upper_lora(FAMILIES["llama"])))
    for case in (*CASES, CASES[0]):
        with torch.no_grad():
            assert torch.isfinite(dpo(**arguments(case)))
        assert_same_results(dpo, case)


def test_what_is_recorded_is_freed_after_the_pass_of_the_policy():
    records: list[LayerRecord] = []
    init = LayerRecord.__init__

    def note(record: LayerRecord, *args: Any) -> None:
        init(record, *args)
        records.append(record)

    def loss(log_probs: PairLogProbs) -> Tensor:
        outputs.append([record.output for record in records])
        return -log_probs.chosen

    outputs: list[list[Any]] = []
    dpo = DPO(upper_lora(FAMILIES["llama"]), loss=loss, reference="adapter")
    with mock.patch.object(LayerRecord, "__init__", note):
        dpo(**arguments(CASES[1]))
        assert ONCE in dpo.explain()
        records.clear()
        dpo(**arguments(CASES[1]))
    assert len(records) == 1 and outputs[1:] == [[None]]


def test_a_policy_that_gives_the_tree_up():
    policy = upper_lora(FAMILIES["llama"])
    dpo = move_policy(DPO(policy, reference="copy", share_prefix="auto"))
    assert_same_results(dpo)
    last, has_run = policy.base_model.model.model.layers[3], []
    layer_class: Any = type(last)
    own = layer_class.forward

    def refuse_once(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if layer is last and not has_run:
            has_run.append(True)
            raise PrefixSharingError("it has changed")
        return own(layer, *args, **kwargs)

    refusing = mock.patch.object(layer_class, "forward", refuse_once)  # one of its own would be probed
    with refusing, pytest.warns(UserWarning, match="no longer shared"):
        results = loss_and_gradients(dpo, CASES[1])
    with whole_passes():
        assert_close(results, loss_and_gradients(dpo, CASES[1]), 1e-12)
    assert_same_results(dpo, expected="for the two are computed over different trees")


def test_autocast():
    dpo = move_policy(DPO(upper_lora(FAMILIES["llama"]).float()))
    assert_same_results(dpo)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_results(dpo)


def test_other_threads_run_whole_passes():
    model = FAMILIES["llama"](0).double()
    layers = language_model(model).decoder_layers()[:2]
    record, ids, outputs = LayerRecord(layers, layers), torch.arange(6)[None], []

    def run() -> None:
        outputs.append(model(ids).logits.detach())

    with record.recording():
        run()
    record.output = torch.zeros_like(record.output)
    with record.replaying():
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert not torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0]) and torch.equal(outputs[3], outputs[0])
