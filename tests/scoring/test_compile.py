"""`torch.compile` of DPO, which runs as it is, and of the model below it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_wrapper import DPO
from dpo_wrapper.models.rerun import attention_tree
from helpers.dpo_calls import nudged
from helpers.forked_scripts import ForkedCommand
from helpers.models import VOCAB, hf_llama
from helpers.naive_dpo import ARGUMENTS
from helpers.shareable_models import SHAREABLE


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
@pytest.mark.usefixtures("one_layer")
def test_what_a_compiled_base_model_wants_is_told():
    dpo = make_dpo()
    dpo.policy_model.model.compile(backend="eager")
    dpo(**ARGUMENTS)
    policy, reference = dpo.explain().splitlines()
    assert policy.endswith("a tree breaks its compiled attention up, share_prefix = False does not")
    assert "compiled" not in reference
    torch._dynamo.reset()


def draw_batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of several sizes and lengths, of pairs that share a prompt of four tokens."""
    generator = torch.Generator().manual_seed(0)
    for b, n, m in [(2, 9, 11), (3, 7, 7), (4, 14, 9), (1, 6, 8), (6, 23, 11), (5, 20, 17)]:
        ids = torch.randint(VOCAB, (2, b, max(n, m)), generator=generator)
        ids[1, :, :4] = ids[0, :, :4]
        yield ids[0, :, :n], ids[1, :, :m], torch.arange(max(n, m)).expand(b, -1) < 4


@pytest.mark.slow
@pytest.mark.parametrize("part", ["layers", "mlp"])
@pytest.mark.parametrize("name", ["hf-llama", "qwen3.5"])
def test_compiled_parts_keep_their_graphs_over_batches_of_any_shape(name, part):
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []
    functions: set[str] = set()  # in graphs that run over a tree

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        names = {str(node.target) for node in graph.graph.nodes if node.op.startswith("call")}

        def run(*args: Any) -> Any:
            functions.update(names if attention_tree() is not None else ())
            return graph.forward(*args)

        return run

    make = SHAREABLE[name]
    plain, dpo = (DPO(nudged(make(0)), reference=make(0), share_prefix=True) for _ in range(2))
    for layer in dpo.policy_model.model.layers:
        (layer if part == "layers" else layer.mlp).compile(backend=record)
    counts = []
    for batch in draw_batches():
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            loss = dpo(*batch)
            loss.backward()
        assert torch.allclose(loss, plain(*batch), atol=1e-5)
        counts.append(len(graphs))
    assert counts[0] > 0 and counts[-1] == counts[0]
    assert any("linear" in function for function in functions)
    outside = ("scaled_dot_product", "softmax", "conv1d", "solve_triangular", "index_select")
    assert not [function for function in functions if any(part in function for part in outside)]
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_model_that_is_compiled_before_any_tree_still_finds_the_first(tmp_path):
    """In a process that has not compiled anything."""
    script = tmp_path / "script.py"
    script.write_text("""
import torch
from dpo_wrapper import DPO
from helpers.models import hf_llama
from helpers.naive_dpo import ARGUMENTS
dpo = DPO(hf_llama(0), reference=hf_llama(0), share_prefix=True)
for layer in dpo.policy_model.model.layers:
    layer.compile(backend="eager")
dpo(**ARGUMENTS)
""")
    command = ForkedCommand(tmp_path / "printed", tmp_path, script)
    assert command.status == 0, command.errors
