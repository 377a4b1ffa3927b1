"""Sequences and their scored tokens, as a model takes them.

This is the one place where ids and masks are shifted.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from beartype import beartype
from jaxtyping import Bool, Float, Int, jaxtyped
from numpy.typing import NDArray
from torch import Tensor

from dpo_wrapper.prefix_tree.layout import TreeLayout, TreeOptions
from dpo_wrapper.prefix_tree.tree import PrefixTree
from dpo_wrapper.tensor_dataclass import TensorDataclass

Ids = Sequence[int]


@dataclass(frozen=True)
class SequenceLogProbs:
    """Log-probs of scored sequences in nats, under the policy or the reference.

    `sums` are those over the scored tokens of each sequence; `tokens` is None where only the sums are known.
    `extras` are further values of each scored token without a gradient, as `token_log_probs` gives them.
    `aux_loss` is the loss that balances the model's experts, where it is wanted.
    """

    sums: Float[Tensor, "s"]
    tokens: Float[Tensor, "t"] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    aux_loss: Float[Tensor, ""] | None = None


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class ScoredSequences(TensorDataclass):
    """Sequences as a model takes them, with a list of their scored tokens.

    `ids` holds the real tokens of each sequence, moved to the left, without those behind the last scored one.
    So every position is what it would be without padding, wherever the caller's padding stood, and a causal
    model needs no mask.

        seq     .  a  b  .  c  d         ids       a  b  c        (d is never an input)
        real    0  1  1  0  1  1         row       0  0           one entry per scored token
        scored  0  0  0  0  1  1         source    1  2           the position that predicts it
                                         target    c  d

    Attributes:
        row, source, target: of each scored token its sequence, the position that predicts it, and its id.
        length: number of scored tokens of each sequence.
        real: number of real ids in each row of `ids`.
    """

    ids: Int[Tensor, "s n"]
    row: Int[Tensor, "t"]
    source: Int[Tensor, "t"]
    target: Int[Tensor, "t"]
    length: Int[Tensor, "s"]
    real: Int[Tensor, "s"]

    @classmethod
    def from_padded(
        cls, seq: Int[Tensor, "s n"], scored: Bool[Tensor, "s n"], real: Bool[Tensor, "s n"]
    ) -> "ScoredSequences":
        """Padded rows of ids, with masks that are True on scored and on real tokens.

        A token is scored if it is real as well. The first real token of a row never is.
        """
        device = seq.device
        seq, scored, real = copy_to_cpu(seq, scored, real)
        order = real.long().argsort(dim=-1, descending=True, stable=True)
        seq, scored, real = (mask.gather(-1, order) for mask in (seq, scored & real, real))
        scored = F.pad(scored[:, 1:], (1, 0), value=False)  # nothing predicts the first real token
        width = max(2, int(scored.any(dim=0).nonzero().max()) + 1) if scored.any() else 2
        # pad or, where the number is negative, cut
        seq, scored, real = (F.pad(mask, (0, width - mask.shape[1])) for mask in (seq, scored, real))

        row, place = scored.nonzero(as_tuple=True)
        last_scored = (scored * torch.arange(width, device=seq.device)).amax(dim=-1, keepdim=True)
        is_input = real[:, :-1] & (torch.arange(width - 1, device=seq.device) < last_scored)
        filler = seq[:, :1].masked_fill(~real[:, :1], 0)  # any valid id does
        return cls(
            ids=seq[:, :-1].where(is_input, filler).long(),
            row=row,
            source=place - 1,
            target=seq[row, place].long(),
            length=scored.sum(dim=-1),
            real=is_input.sum(dim=-1),
        ).to(device)

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        scored: Sequence[Sequence[bool] | None] | None = None,
    ) -> "ScoredSequences":
        """Each prompt followed by its completion, as token ids.

        `scored` says of each sequence which tokens of prompt and completion are scored; by default, and where
        it is None, these are the completion's.
        """
        lengths = np.array([len(x) + len(y) for x, y in zip(prompts, completions, strict=True)], np.int64)
        if not len(lengths):
            raise ValueError("a batch should have at least one completion, but it has none: leave it out.")
        parts = (ids for pair in zip(prompts, completions, strict=True) for ids in pair)
        tokens = np.fromiter(chain.from_iterable(parts), np.int64, lengths.sum())
        start, row = lengths.cumsum() - lengths, np.arange(len(lengths)).repeat(lengths)
        place = np.arange(len(tokens)) - start[row]
        is_scored = place >= np.array([len(prompt) for prompt in prompts])[row]
        for first, mask in zip(start.tolist(), scored or (), strict=False):
            if mask is not None:
                is_scored[first : first + len(mask)] = mask
        is_scored &= place > 0  # nothing predicts a first token
        last_scored = np.zeros(len(lengths), np.int64)
        last_scored[row[is_scored]] = place[is_scored]  # of several in a row the last one stays
        is_input = place < last_scored[row]
        filler = np.append(tokens, 0)[start] * (lengths > 0)  # any valid id does
        ids = filler[:, None].repeat(max(1, last_scored.max()), axis=1)
        ids[row[is_input], place[is_input]] = tokens[is_input]
        length = np.bincount(row[is_scored], minlength=len(lengths))
        arrays = (ids, row[is_scored], place[is_scored] - 1, tokens[is_scored], length, last_scored)
        return cls(*map(torch.from_numpy, arrays))

    def as_tree(self, options: TreeOptions) -> "ScoredTreeTokens":
        """The same sequences as a prefix tree, built once for each of the options."""
        trees = vars(self).setdefault("_trees", {})
        if options not in trees:
            with torch.inference_mode(False):  # a later pass over the tree may compute gradients
                trees[options] = self.build_tree(options)
        return trees[options]

    def build_tree(self, options: TreeOptions) -> "ScoredTreeTokens":
        """Build the tree on the CPU, and move it to where the sequences are."""
        host = self.on_cpu
        if host is not self:
            return host.as_tree(options).to(self.ids.device)
        # inside of the context each call of torch takes longer
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            return ScoredTreeTokens.from_sequences(self, options)

    def prebuild_tree(self, options: TreeOptions | None) -> "ScoredSequences":
        """Build the tree ahead of the forward pass, where the tokens are still on the CPU."""
        if options is not None and len(self.target):
            self.as_tree(options)
        return self

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "ScoredSequences":
        """The same with every tensor replaced, those of trees that are built already among them."""
        sequences = super().map_tensors(function)
        trees = vars(self).get("_trees", {})
        vars(sequences)["_trees"] = {options: tree.map_tensors(function) for options, tree in trees.items()}
        if "_content_hashes" in vars(self):
            vars(sequences)["_content_hashes"] = vars(self)["_content_hashes"]
        return sequences

    def content_hashes(self) -> tuple[bytes, ...]:
        """A hash of each sequence's ids and scored tokens, the same in any batch and with any padding."""
        if "_content_hashes" not in vars(self):
            host = self.on_cpu
            sources, targets, ends = (t.numpy() for t in (host.source, host.target, host.length.cumsum(0)))
            hashes, start = [], 0
            for ids, end in zip(self.unpadded_rows(), ends.tolist(), strict=True):
                parts = (np.array([len(ids), end - start]), ids, sources[start:end], targets[start:end])
                content = np.concatenate(parts, dtype=np.int64)
                hashes.append(hashlib.blake2b(content.data, digest_size=16).digest())
                start = end
            vars(self)["_content_hashes"] = tuple(hashes)
        return vars(self)["_content_hashes"]

    def sum_per_sequence(self, tokens: Float[Tensor, "t"]) -> Float[Tensor, "s"]:
        """Sum per sequence of one value per scored token, in an order that no device changes."""
        table = tokens.new_zeros(self.ids.shape)
        return table.index_put((self.row, self.source), tokens).sum(dim=-1)

    def log_probs(self, tokens: Tensor, extras: Mapping[str, Tensor] | None = None) -> SequenceLogProbs:
        """`SequenceLogProbs` from the log-prob of each scored token."""
        return SequenceLogProbs(self.sum_per_sequence(tokens), tokens, extras or {})

    @property
    def is_input(self) -> Bool[Tensor, "s n"]:
        """Which of `ids` are real."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.real[:, None]

    def unpadded_rows(self) -> list[NDArray[np.int64]]:
        """Each row of `ids` without its padding."""
        host = self.on_cpu
        return [row[:length] for row, length in zip(host.ids.numpy(), host.real.tolist(), strict=True)]

    @property
    def has_tree(self) -> bool:
        """Whether a tree of the sequences has been built."""
        return bool(vars(self).get("_trees"))

    def unique_tokens(self) -> int:
        """Number of tokens if every prefix that sequences share is counted once."""
        for tree in vars(self).get("_trees", {}).values():
            return len(tree.layout.subtree_end)
        return len(PrefixTree.from_sequences(self.unpadded_rows()).ids)


@dataclass(frozen=True)
class ScoredTreeTokens(TensorDataclass):
    """The scored tokens of sequences on their prefix tree; equal tokens after the same past are one entry.

    `source` and `target` are of each entry the token of the tree that predicts it, and its id; `entry` is for
    each scored token of the sequences its index among the entries. `count` is the number of sequences that
    each token of the layout stands in, 0 for padding.
    """

    layout: TreeLayout
    source: Int[Tensor, "e"]
    target: Int[Tensor, "e"]
    entry: Int[Tensor, "t"]
    count: Int[Tensor, "r w"]

    @classmethod
    def from_sequences(cls, sequences: ScoredSequences, options: TreeOptions) -> "ScoredTreeTokens":
        """Build the tree of sequences on the CPU."""
        tree = PrefixTree.from_sequences(sequences.unpadded_rows())
        scored = tree.path[tree.start[sequences.row] + sequences.source]
        source, target, entry = unique_pairs(scored, sequences.target)
        layout = TreeLayout.from_tree(tree, options)
        count = tree.path.bincount(minlength=layout.ids.numel()).view_as(layout.ids)
        return cls(layout, source, target, entry, count)


def copy_to_cpu(
    seq: Int[Tensor, "s n"], scored: Bool[Tensor, "s n"], real: Bool[Tensor, "s n"]
) -> tuple[Int[Tensor, "s n"], Bool[Tensor, "s n"], Bool[Tensor, "s n"]]:
    """Rows of ids and their masks on the CPU; a device on which they are is waited for once."""
    if seq.device.type == "cpu":
        return seq, scored, real
    ids, is_scored, is_real = torch.stack([seq.long(), scored.long(), real.long()]).cpu()
    return ids, is_scored.bool(), is_real.bool()


def unique_pairs(
    first: Int[Tensor, "t"], second: Int[Tensor, "t"]
) -> tuple[Int[Tensor, "e"], Int[Tensor, "e"], Int[Tensor, "t"]]:
    """The different pairs in ascending order, and for each pair given its index among them.

    Equal to `torch.unique(torch.stack([first, second]), dim=1, return_inverse=True)`, which compares columns
    instead of one integer for each pair, and is 50 times as slow.
    """
    lowest = int(second.min()) if len(second) else 0
    width = int(second.max()) - lowest + 1 if len(second) else 1
    keys, index = torch.unique(first * width + (second - lowest), return_inverse=True)
    return keys.div(width, rounding_mode="floor"), keys % width + lowest, index
