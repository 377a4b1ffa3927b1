"""Shared prefixes against padded rows: the same log-probs, loss and gradients."""

import contextlib
import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from dpo_wrapper import DPO
from dpo_wrapper.prefix_tree import cpu_attention
from helpers.dpo_calls import LN2
from helpers.kernels import shares_prefix, tree_kernels
from helpers.marks import mark_slow_except
from helpers.models import CONTEXT, ZOO, seeded
from helpers.oracle import ExactFloat64
from helpers.shareable_models import (
    CASES,
    NOT_SHAREABLE,
    SHAREABLE,
    assert_close,
    batch_with_shared_prefixes,
    held_attributes,
    loss_and_gradients,
    make_dpo,
)


@pytest.mark.parametrize(
    "exact", [pytest.param(True, id="float64", marks=pytest.mark.slow), pytest.param(False, id="float32")]
)
@pytest.mark.parametrize(
    "name",
    mark_slow_except(["xt-rotary", "xt-alibi", "hf-llama-gqa", "hf-gpt2", "qwen3.5", "lfm2"], SHAREABLE),
)
def test_shared_prefixes_change_no_log_prob_loss_or_gradient(name, exact, monkeypatch):
    if name == "dory" and not exact:
        pytest.skip("its random weights give gradients of some hundred, of which float32 has three digits")
    arithmetic = ExactFloat64 if exact else contextlib.nullcontext
    padded = make_dpo(SHAREABLE[name], False, exact=exact)
    with arithmetic():
        expected = [loss_and_gradients(padded, case) for case in CASES]
    assert not shares_prefix(padded)
    for min_branch_numel in (math.inf, 0):  # along each path, and by torch's kernel on each branch
        monkeypatch.setattr(cpu_attention, "MIN_BRANCH_NUMEL", min_branch_numel)
        shared = make_dpo(SHAREABLE[name], True, exact=exact)
        for case, truth in zip(CASES, expected, strict=True):
            with arithmetic():
                results = loss_and_gradients(shared, case)
            assert_close(results, truth, 1e-10 if exact else 3e-5)
        assert shares_prefix(shared)
        assert max(g.abs().max() for key, g in results.items() if key.startswith("gradient")) > 1e-3
        if "branches" not in tree_kernels(shared):
            break  # the model's own attention, which never takes the kernel


@pytest.mark.parametrize(
    "name",
    mark_slow_except(
        ["xt-absolute", "xt-shift", "hf-opt"],
        ["xt-absolute", "xt-polar", "xt-shift", "xt-gru", "hf-gpt2", "hf-opt"],
    ),
)
def test_trees_larger_than_the_table_of_positions_are_laid_out_in_several_rows(name):
    shared, padded = (make_dpo(SHAREABLE[name], share, exact=True) for share in (True, False))
    case = batch_with_shared_prefixes(b=20, n=CONTEXT)
    with ExactFloat64():
        results, expected = loss_and_gradients(shared, case), loss_and_gradients(padded, case)
    assert_close(results, expected, 1e-10)
    assert results["tokens/unique"] > 300 > CONTEXT and shares_prefix(shared)


@pytest.mark.usefixtures("each_kernel")
def test_lora():
    peft = pytest.importorskip("peft")
    config, dpos = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]), []
    for share in (True, False):
        with seeded(0):
            dpos.append(DPO(peft.get_peft_model(ZOO["hf-llama"](0), config), share_prefix=share))
            for name, p in dpos[-1].named_parameters():
                p.data += torch.randn_like(p) * ("lora_B" in name)
    assert dpos[0].ref_model is None  # the reference is the policy with its adapter off
    for case in CASES:
        results = loss_and_gradients(dpos[0], case)
        assert_close(results, loss_and_gradients(dpos[1], case), 3e-5)
    base = loss_and_gradients(DPO(ZOO["hf-llama"](0)), CASES[-1])["logps/chosen"]
    assert abs(base - results["logps/ref_chosen"]) < 1e-4 < 1e-2 < abs(base - results["logps/chosen"])
    assert shares_prefix(dpos[0])


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(
    "name",
    mark_slow_except(["xt-t5", "hf-llama"], ["xt-rotary-flash", "xt-t5", "hf-llama", "gemma2", "hf-opt"]),
)
def test_autocast(name):
    shared, padded = (make_dpo(SHAREABLE[name], share) for share in ("auto", False))
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = loss_and_gradients(shared, CASES[2]), loss_and_gradients(padded, CASES[2])
    assert shares_prefix(shared)
    assert abs(results["loss"] - expected["loss"]) < 0.03
    difference = abs(results["logps/chosen"] - expected["logps/chosen"])
    assert difference < 0.01 * abs(expected["logps/chosen"])


@pytest.mark.filterwarnings("ignore:prefixes are not shared")
@pytest.mark.parametrize(
    "policy, reference",
    mark_slow_except(
        [
            ("xt-rotary", "hf-llama"),
            ("gemma2", "xt-alibi"),
            ("gemma2", "memory-kv"),
            ("xt-rotary", "qwen3.5"),
        ],
        product(
            ["xt-rotary", "gemma2"], ["hf-llama", "hf-gpt2", "xt-alibi", "qwen3.5", "memory-kv", "plain-gru"]
        ),
    ),
)
def test_policy_and_reference_of_different_families(policy, reference):
    make_reference = SHAREABLE.get(reference) or NOT_SHAREABLE[reference][0]
    shared, padded = (
        make_dpo(SHAREABLE[policy], share, make_reference=make_reference) for share in ("auto", False)
    )
    before = held_attributes(shared)
    for case in (*CASES, *CASES):
        assert_close(loss_and_gradients(shared, case), loss_and_gradients(padded, case), 3e-5)
    assert held_attributes(shared) == before
    assert shared.policy.probe.why_padded is None and shares_prefix(shared) == (reference in SHAREABLE)


@pytest.mark.parametrize("name", ["xt-absolute", "hf-llama"])
def test_batches_of_nothing_of_one_pair_and_of_equal_sides(name):
    shared, padded = (make_dpo(SHAREABLE[name], share) for share in (True, False))
    one, case = batch_with_shared_prefixes(b=1), CASES[1]
    empty = replace(case, prompt_masks=tuple(torch.ones_like(mask) for mask in case.prompt_masks))
    equal = replace(case, unpreferred_seq=case.preferred_seq, seq_masks=(case.seq_masks[0],) * 2)
    for batch in (empty, one, equal, empty):
        assert_close(loss_and_gradients(shared, batch), loss_and_gradients(padded, batch), 3e-5)
    assert abs(loss_and_gradients(shared, equal)["loss"] - LN2) < 1e-6
    assert loss_and_gradients(shared, empty)["loss"] == 0 and shares_prefix(shared)
