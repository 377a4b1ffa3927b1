"""Which kernel a `DPO` computes attention over trees with, after a call."""

from dataclasses import replace

from dpo_wrapper import DPO
from dpo_wrapper.prefix_tree import TreeKernel
from dpo_wrapper.reference.reference import ModelReference
from dpo_wrapper.scoring import Scorer
from dpo_wrapper.scoring.token_log_probs import Probe


def scorers(dpo: DPO) -> tuple[Scorer, Scorer]:
    """Of policy and reference, which is a model."""
    assert isinstance(dpo.reference, ModelReference)
    return dpo.policy, dpo.reference.scorer


def probes(dpo: DPO) -> list[Probe]:
    """What the first call has found of policy and reference."""
    return [scorer.probe for scorer in scorers(dpo) if scorer.probe is not None]


def shares_prefix(dpo: DPO) -> bool:
    """Whether both policy and reference compute shared prefixes once."""
    return all(probe.why_padded is None for probe in probes(dpo))


def tree_kernels(dpo: DPO) -> set[TreeKernel]:
    """The kernels of policy and reference; none if their sequences are padded."""
    trees = [probe.tree for probe in probes(dpo)]
    return {tree.kernel for tree in trees if tree is not None}


def use_kernel(dpo: DPO, kernel: TreeKernel) -> None:
    """Have policy and reference use a kernel, whatever their probe has found."""
    for scorer in scorers(dpo):
        for key, probe in scorer.probes.items():
            assert probe.tree is not None
            scorer.probes[key] = replace(probe, tree=replace(probe.tree, kernel=kernel))
