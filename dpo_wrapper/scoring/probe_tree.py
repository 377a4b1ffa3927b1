"""The trial of shared prefixes: do log-probs and gradients over a prefix tree equal those of padded rows?

A tree mixes up what should be apart in two ways. A branch may see its sibling, which stands before it in the
tree's row: the trial changes the tokens of one branch, and the log-probs of the others should stay the same,
in narrow dtypes to the bit, however small the weights are. And positions may be wrong, or layers run again in
backward when the tree is gone: log-probs and gradients are compared with those of padded rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.models import LanguageModel
from dpo_wrapper.models.wrappers import is_sharded
from dpo_wrapper.prefix_tree import PrefixSharingError, StateKernel, TreeKernel, TreeOptions
from dpo_wrapper.scoring.probe import Probe
from dpo_wrapper.scoring.rounding import narrowest_dtype, why_gradients_differ, why_log_probs_differ
from dpo_wrapper.scoring.token_log_probs import compute_log_probs

LONGEST = 200
"""Tokens of the longest sequence: with it, FlexAttention has blocks of 128 that are full, and several."""

LONGEST_ON_CPU = 20
"""The same for a model so large that on the CPU the trial would take seconds."""

LARGE_NUMEL = 2**24
"""The number of weights from which on a model is large for that."""

MAX_GRADIENT_NUMEL = 2**16
"""Parameters of at most this size have their gradients compared, and the first and the last that trains."""

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
"""How much log-probs of other branches may change, relative to the largest; in narrow dtypes not at all."""


class TreeTrial:
    """Computes two pairs of sequences with a model, as padded rows and as a prefix tree.

    Attributes:
        model, probe: the model, and what is known of it so far.
        needs_grad: whether gradients are compared.
        longest: tokens of the longest sequence.
        dtype: the narrowest that the model computes in.
    """

    def __init__(self, model: LanguageModel, probe: Probe, needs_grad: bool) -> None:
        self.model, self.probe = model, probe
        self.needs_grad = needs_grad and not is_sharded(model.model)  # backward would reduce gradients
        is_large = sum(p.numel() for p in model.model.parameters()) > LARGE_NUMEL
        longest = LONGEST_ON_CPU if is_large and probe.device.type == "cpu" else LONGEST
        self.longest = min(longest, model.max_positions or longest)
        self.dtype = narrowest_dtype(model.model, probe.device)
        if model.recurrent_layers and self.dtype == torch.float64:
            self.dtype = torch.float32  # their states are computed in it, whatever the weights are

    def sequences(self, changed_row: int | None = None) -> ScoredSequences:
        """Two pairs with a shared prefix each; all tokens of one branch but its first may be changed.

        In the tree, row 0 stands before row 1, and that before rows 2 and 3.
        """
        n, v = self.longest, self.probe.vocab_size
        short = max(4, n // 4)
        ids = torch.randint(v, (4, n), generator=torch.Generator().manual_seed(0), device="cpu")
        low, high = (v - 1) // 2, (v - 1) // 2 + 1  # small ids are often padding
        for row, root, shared in ((0, low, 7 * n // 10), (2, high, short // 4)):
            ids[row, 0] = root
            ids[row + 1, :shared] = ids[row, :shared]
            ids[row, shared], ids[row + 1, shared] = low, high
            if changed_row in (row, row + 1):
                ids[changed_row, shared + 1 :] = (ids[changed_row, shared + 1 :] + 1) % v
        lengths = torch.tensor([n, n, short, short], device="cpu")
        real = torch.arange(n, device="cpu") < lengths[:, None]
        return ScoredSequences.from_padded(ids, real, real)

    @cached_property
    def padded(self) -> tuple[Tensor, list[Tensor | None]]:
        """Log-probs and gradients of padded rows."""
        sequences = self.sequences().to(self.probe.device)
        return self.run(sequences, replace(self.probe, tree=None))

    def run(self, sequences: ScoredSequences, probe: Probe) -> tuple[Tensor, list[Tensor | None]]:
        """The log-prob of each scored token, and the gradients of a weighted sum of them."""
        torch.clear_autocast_cache()
        with differentiated_parameters(self.model.model, self.needs_grad) as parameters:
            tokens = compute_log_probs(self.model, sequences, probe).tokens
            assert tokens is not None
            if tokens.requires_grad:
                weights = torch.randn(len(tokens), generator=torch.Generator().manual_seed(1), device="cpu")
                (tokens * weights.to(tokens)).sum().backward()
            return tokens.detach(), [p.grad for p in parameters]

    def why_not_shared(self, options: TreeOptions) -> tuple[str | None, frozenset[TreeKernel | StateKernel]]:
        """Why the model may not run over a tree by a kernel, or None; and what has computed its attention."""
        if self.longest < 8:
            return "its rows are too short", frozenset()
        tree = replace(options, min_branch_numel=0)  # the kernel is tried on short branches too
        sequences = self.sequences().prebuild_tree(tree).to(self.probe.device)
        reason = self.why_different(sequences, replace(self.probe, tree=tree))
        return reason, frozenset(sequences.as_tree(tree).layout.kernels)

    def why_different(self, sequences: ScoredSequences, probe: Probe) -> str | None:
        """Why the results over the tree of `probe` are not those of padded rows; None if they are."""
        try:
            padded_tokens, padded_gradients = self.padded
        except Exception as error:  # whatever a model's code may raise, padded rows remain
            return f"its pass over padded rows fails ({describe_error(error)})"
        try:
            tokens, gradients = self.run(sequences, probe)
            mixes_branches = self.mixes_branches(sequences, probe, tokens)
            ignores_positions = self.ignores_positions(sequences, probe, tokens)
        except PrefixSharingError as error:
            return str(error)
        except Exception as error:
            return describe_error(error)
        if mixes_branches:
            return "its log-probs would differ, for they depend on other branches of the tree"
        # in narrow dtypes, rounding may send some tokens to other experts of a mixture
        quantile = 0.8 if torch.finfo(self.dtype).bits <= 16 else 1.0
        reason = why_log_probs_differ(tokens, padded_tokens, self.dtype, quantile)
        if reason is not None:
            return reason
        if ignores_positions:
            return "its log-probs would differ, for they do not depend on the positions of a tree"
        return why_gradients_differ(gradients, padded_gradients, self.dtype)

    def mixes_branches(self, sequences: ScoredSequences, probe: Probe, tokens: Tensor) -> bool:
        """Whether changing one branch changes log-probs of another.

        Experts of a mixture, and kernels that add in any order, round a token differently among other tokens:
        how much, a change of the last branch tells, of which no other can know in a causal model.
        """

        def largest_change(row: int) -> float:
            changed = self.sequences(row).prebuild_tree(probe.tree).to(self.probe.device)
            difference = (self.log_probs(changed, probe) - tokens)[sequences.row != row]
            return float(difference.abs().nan_to_num(torch.inf).max())

        change, scale = largest_change(0), float(tokens.abs().max())
        return change > ROUNDING.get(self.dtype, 0.0) * scale and not change <= 10 * largest_change(3)

    def ignores_positions(self, sequences: ScoredSequences, probe: Probe, tokens: Tensor) -> bool:
        """Whether a model counts positions in the tree's row by itself, as BLOOM does for its biases.

        It is looked at in narrow dtypes alone: in others, wrong positions are more than rounding. Models
        whose layers carry a state know the order of tokens by it, and many have no positions.
        """
        may_count = self.model.has_own_positions and not self.model.recurrent_layers
        if not may_count or torch.finfo(self.dtype).bits > 16:
            return False
        assert probe.tree is not None
        tree = sequences.as_tree(probe.tree)
        layout = replace(tree.layout, position=tree.layout.position // 2)
        moved = replace(sequences)
        vars(moved)["_trees"] = {probe.tree: replace(tree, layout=layout)}
        return torch.equal(self.log_probs(moved, probe), tokens)

    def log_probs(self, sequences: ScoredSequences, probe: Probe) -> Tensor:
        """The log-prob of each scored token, computed as in training but without a backward pass."""
        torch.clear_autocast_cache()
        with torch.set_grad_enabled(self.needs_grad):
            tokens = compute_log_probs(self.model, sequences, probe).tokens
        assert tokens is not None
        return tokens.detach()


@contextmanager
def differentiated_parameters(model: nn.Module, needs_grad: bool) -> Iterator[list[nn.Parameter]]:
    """Inside this context only some parameters train, to save time: small ones, the first and the last."""
    trained = [p for p in model.parameters() if p.requires_grad] if needs_grad else []
    numel = sum(p.numel() for p in trained)
    chosen = [
        p
        for k, p in enumerate(trained)
        if numel <= LARGE_NUMEL or p.numel() <= MAX_GRADIENT_NUMEL or k in (0, len(trained) - 1)
    ]
    others = {id(p) for p in trained} - {id(p) for p in chosen}
    for p in trained:
        p.requires_grad_(id(p) not in others)
        p.grad = None
    try:
        with torch.set_grad_enabled(needs_grad):
            yield chosen
    finally:
        for p in trained:
            p.requires_grad_(True)


def describe_error(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
