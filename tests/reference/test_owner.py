"""Policies and references that are wrapped or replaced after DPO was made, and what can train."""

import copy
from itertools import product

import pytest
import torch
from torch import distributed, nn

from dpo_wrapper import DPO, SimPO, precompute_ref_log_probs
from dpo_wrapper.data import scored_sequences
from helpers.adapters import lora
from helpers.datasets import pairs
from helpers.dpo_calls import LN2, nudged
from helpers.marks import mark_slow_except
from helpers.models import ZOO
from helpers.naive_dpo import ARGUMENTS, naive_loss, reference_log_probs, train
from helpers.runs import run_in_two_processes


@pytest.mark.parametrize(
    "name, used",
    mark_slow_except(
        [("hf-llama", False), ("xt-tied", True)], product(["hf-llama", "xt-tied"], [True, False])
    ),
)
def test_a_policy_that_is_assigned_is_the_policy(name, used):
    dpo, other = DPO(ZOO[name](0)), ZOO[name](1)
    keys = set(dpo.state_dict())
    if used:
        dpo(**ARGUMENTS)
    before = reference_log_probs(dpo) if used else None
    dpo.policy_model = other
    expected = DPO(other, reference=dpo.ref_model)
    loss = dpo(**ARGUMENTS)
    assert abs(loss - LN2) > 1e-3 and torch.equal(loss, expected(**ARGUMENTS))
    torch.testing.assert_close(loss, naive_loss(other.eval(), ZOO[name](0).eval()), rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in other.parameters()) and set(dpo.state_dict()) == keys
    assert before in (None, reference_log_probs(dpo))
    train(copy.deepcopy(dpo), steps=1)


@pytest.mark.parametrize("start", ["copy", "none", "adapter"])
def test_a_reference_that_is_assigned_is_the_reference(start):
    policy = lora(ZOO["hf-llama"](0)) if start == "adapter" else ZOO["hf-llama"](0)
    dpo = DPO(policy, reference=start, cache_ref_log_probs=start != "none")
    other = ZOO["xt-rotary"](1)
    dpo(**ARGUMENTS)
    dpo.ref_model = other
    assert dpo.ref_model is other
    expected = DPO(policy, reference=other)(**ARGUMENTS)
    for _ in range(2):
        torch.testing.assert_close(dpo(**ARGUMENTS), expected)
    assert "reference: a frozen model; x-transformers model" in dpo.explain()
    assert {key.split(".")[0] for key in dpo.state_dict()} == {"policy_model", "ref_model"}


def test_what_cannot_be_assigned_is_refused():
    policy = lora(ZOO["hf-llama"](0))
    dpo = DPO(policy)
    with pytest.raises(
        ValueError, match=r"policy_model should have an adapter.*but it has none: make a new DPO"
    ):
        dpo.policy_model = ZOO["hf-llama"](0)
    with pytest.raises(ValueError, match="shares trained parameters with the policy"):
        dpo.ref_model = policy
    assert dpo.policy_model is policy and dpo.ref_model is None
    dpo.ref_model = None  # which it is
    dpo = DPO(ZOO["hf-llama"](0))
    reference = dpo.ref_model
    with pytest.raises(ValueError, match="shares trained parameters with the policy"):
        dpo.policy_model = dpo.ref_model.requires_grad_(True)
    for name in ("policy_model", "ref_model"):
        with pytest.raises(TypeError, match=f"{name} should be a module, but it is None: make a new DPO"):
            setattr(dpo, name, None)
    assert dpo.ref_model is reference


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
@pytest.mark.filterwarnings("ignore:a Hugging Face model should be compiled")
@pytest.mark.parametrize("make", [ZOO["hf-llama"], lambda seed: lora(ZOO["hf-llama"](seed))])
def test_a_policy_compiled_afterwards(make):
    torch.manual_seed(0)
    plain, dpo = DPO(make(0)), DPO(make(0))
    dpo.policy_model = torch.compile(dpo.policy_model, backend="eager")
    for each in (plain, dpo):
        assert abs(each(**ARGUMENTS) - LN2) < 1e-6
        train(each)
    assert torch.allclose(dpo(**ARGUMENTS), plain(**ARGUMENTS), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
def test_a_policy_wrapped_by_the_older_fsdp(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, dpo = DPO(ZOO["hf-llama"](0)), DPO(ZOO["hf-llama"](0))
        dpo.policy_model = FullyShardedDataParallel(dpo.policy_model, device_id=torch.device("cpu"))
        for each in (plain, dpo):
            train(each)
        assert torch.allclose(dpo(**ARGUMENTS), plain(**ARGUMENTS), atol=1e-5)
        assert abs(dpo(**ARGUMENTS) - LN2) > 1e-3
    finally:
        distributed.destroy_process_group()


# what trains


def test_a_policy_of_which_nothing_trains_is_refused_in_training_alone():
    dpo = DPO(lora(ZOO["hf-llama"](0)))
    dpo.policy_model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"a parameter of the policy should train.*is_trainable = True"):
        dpo(**ARGUMENTS)
    with torch.no_grad():
        assert abs(dpo(**ARGUMENTS) - LN2) < 1e-6
    assert abs(dpo.eval()(**ARGUMENTS) - LN2) < 1e-6
    with pytest.raises(ValueError, match="a parameter of the policy should train"):
        DPO(ZOO["xt-tied"](0).requires_grad_(False), loss=SimPO())(**ARGUMENTS)


@pytest.mark.parametrize("kind", ["none", "module", "cached"])
def test_a_merged_policy_is_refused_in_training_alone(kind, tmp_path):
    policy, other = lora(ZOO["hf-llama"](0)), ZOO["hf-llama"](0)
    nudged(policy, 0.1), nudged(other, 0.1)
    cached = precompute_ref_log_probs(scored_sequences(pairs(), 30), other, tmp_path)
    options = {"none": {"loss": SimPO()}, "module": {"reference": other}, "cached": {"reference": cached}}
    dpo = DPO(policy, **options[kind])
    policy.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter .* but it is merged into them: call unmerge_adapter\(\)"):
        dpo(**ARGUMENTS)
    if kind != "cached":
        with torch.no_grad():
            merged = dpo(**ARGUMENTS)
        policy.unmerge_adapter()
        torch.testing.assert_close(dpo(**ARGUMENTS), merged, rtol=1e-5, atol=1e-5)


def test_a_module_without_parameters_may_be_scored():
    class Uniform(nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, 37)

    assert abs(DPO(Uniform(), reference=Uniform())(**ARGUMENTS) - LN2) < 1e-6


def test_replicas_in_threads_are_refused():
    with pytest.raises(TypeError, match=r"nn.DataParallel makes replicas .* use DistributedDataParallel"):
        DPO(ZOO["hf-llama"](0))._replicate_for_data_parallel()


DATA_PARALLEL = """
import torch
from accelerate import PartialState
from torch.nn.parallel import DistributedDataParallel
from dpo_wrapper import DPO
from helpers.models import ZOO
from helpers.naive_dpo import ARGUMENTS
from helpers.runs import run_in_two_processes

torch.set_num_threads(1)
rank = PartialState(cpu=True).process_index
halves = (slice(0, 2), slice(1, 3))

def rows(which):
    cut = lambda value: tuple(map(cut, value)) if isinstance(value, tuple) else value[which]
    return {name: cut(value) for name, value in ARGUMENTS.items()}

dpos = [DPO(ZOO["hf-llama"](0), reference=ZOO["xt-rotary"](1)) for _ in range(2)]
parallel = DistributedDataParallel(dpos[0])
for _ in range(2):  # an unfinished reduction would raise in the second step
    parallel(**rows(halves[rank])).backward()
    sum(dpos[1](**rows(half)) / 2 for half in halves).backward()
for p, expected in zip(dpos[0].policy_model.parameters(), dpos[1].policy_model.parameters(), strict=True):
    torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6)
"""


@pytest.mark.slow
def test_a_given_module_that_is_not_frozen_under_data_parallel(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DATA_PARALLEL)
    run_in_two_processes(script)
