"""`torch.compile` of DPO, which runs as it is, and of the model below it."""

import pytest
import torch

from dpo_wrapper import DPO
from helpers.dpo_calls import nudged
from helpers.models import hf_llama
from helpers.naive_dpo import ARGUMENTS


def make_dpo() -> DPO:
    return DPO(nudged(hf_llama(0)), reference=hf_llama(0))


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torch.compile", "dpo.compile"])
def test_a_compiled_dpo_runs_uncompiled_and_says_so(by):
    from torch._dynamo.testing import CompileCounter

    plain, dpo, backend = make_dpo(), make_dpo(), CompileCounter()
    torch._dynamo.reset()
    compiled = dpo
    if by == "torch.compile":
        compiled = torch.compile(dpo, backend=backend)
    else:
        dpo.compile(backend=backend)
    with pytest.warns(UserWarning, match="should be given parts of the model, but it is given DPO") as told:
        loss = compiled(**ARGUMENTS)
        compiled(**ARGUMENTS)
    assert len([w for w in told if "given DPO" in str(w.message)]) == 1
    loss.backward()
    expected = plain(**ARGUMENTS)
    expected.backward()
    assert loss.item() == expected.item() and backend.frame_count == 0
    for p, truth in zip(dpo.policy_model.parameters(), plain.policy_model.parameters(), strict=True):
        assert torch.equal(p.grad, truth.grad)
    assert dpo.explain().endswith("compiled: no, for each batch is another tree")
    assert "compiled" not in plain.explain()
    torch._dynamo.reset()


@pytest.mark.slow
def test_what_a_compiled_base_model_wants_is_told():
    dpo = make_dpo()
    dpo.policy_model.model.compile(backend="eager")
    dpo(**ARGUMENTS)
    policy, reference = dpo.explain().splitlines()
    assert policy.endswith("a tree breaks its compiled attention up, share_prefix = False does not")
    assert "compiled" not in reference
    torch._dynamo.reset()
