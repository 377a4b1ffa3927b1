"""From padded rows and masks to what a model computes and what of it is scored.

The one place where ids and masks shift.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from jaxtyping import Bool, Float, Int, jaxtyped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo_wrapper.prefix_tree import PrefixTree, TreeLayout, TreeOptions
from dpo_wrapper.tensor_dataclass import TensorDataclass

Ids = Sequence[int]


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class ScoredSequences(TensorDataclass):
    """Sequences as a model should see them, with their scored tokens listed.

    `ids` holds each sequence's real tokens, moved to the left, without those behind the last scored one:
    wherever the caller's padding stood, every position is what it would be without any, and a causal model
    needs no mask.

        seq     .  a  b  .  c  d         ids       a  b  c        (d is never an input)
        real    0  1  1  0  1  1         row       0  0           one entry per scored token
        scored  0  0  0  0  1  1         source    1  2           where its score is read: the token before
                                         target    c  d

    `length` is the number of scored tokens of each sequence, `real` the number of real ids in its row.
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
        order = real.long().argsort(dim=-1, descending=True, stable=True)
        seq, scored, real = (t.gather(-1, order) for t in (seq, scored & real, real))
        scored = F.pad(scored[:, 1:], (1, 0), value=False)  # nothing stands before the first real token
        width = max(2, int(scored.any(dim=0).nonzero().max()) + 1) if scored.any() else 2
        seq, scored, real = (
            F.pad(t, (0, max(0, width - t.shape[1])))[:, :width] for t in (seq, scored, real)
        )

        row, place = scored.nonzero(as_tuple=True)
        last = (scored * torch.arange(width, device=seq.device)).amax(dim=-1, keepdim=True)
        inputs = real[:, :-1] & (torch.arange(width - 1, device=seq.device) < last)
        filler = seq[:, :1].masked_fill(~real[:, :1], 0)  # any valid id does; a row's first is no pad id
        return cls(
            ids=seq[:, :-1].where(inputs, filler).long(),
            row=row,
            source=place - 1,
            target=seq[row, place].long(),
            length=scored.sum(dim=-1),
            real=inputs.sum(dim=-1),
        )

    @classmethod
    def from_lists(cls, prompts: Sequence[Ids], completions: Sequence[Ids]) -> "ScoredSequences":
        """Each prompt followed by its completion, whose tokens are scored, all as token ids."""
        rows = [torch.tensor([*x, *y], dtype=torch.long) for x, y in zip(prompts, completions, strict=True)]
        if not rows:
            raise ValueError("expected at least one completion, got none: leave such a batch out.")
        seqs = pad_sequence(rows, batch_first=True)
        place = torch.arange(seqs.shape[1])
        real = place < torch.tensor([[len(row)] for row in rows])
        return cls.from_padded(seqs, place >= torch.tensor([[len(x)] for x in prompts]), real)

    def over_tree(self, plan: TreeOptions) -> "ScoredTree":
        """The same as a prefix tree, made once for each plan."""
        made = vars(self).setdefault("_trees", {})
        if plan not in made:
            made[plan] = ScoredTree.of(self, plan)
        return made[plan]

    def laid_out(self, plan: TreeOptions | None) -> "ScoredSequences":
        """The same with its tree made ahead, where tokens are still on the CPU."""
        if plan is not None and len(self.target):
            self.over_tree(plan)
        return self

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "ScoredSequences":
        moved, made = super().map_tensors(function), vars(self).get("_trees", {})
        vars(moved)["_trees"] = {key: tree.map_tensors(function) for key, tree in made.items()}
        if "_names" in vars(self):
            vars(moved)["_names"] = vars(self)["_names"]
        return moved

    def names(self) -> tuple[bytes, ...]:
        """What each sequence is known by in any batch: a hash of its ids and of which of them are scored."""
        if "_names" not in vars(self):
            lengths = self.length.tolist()
            sources, targets = (t.cpu().split(lengths) for t in (self.source, self.target))
            named = []
            for ids, source, target in zip(self.inputs(), sources, targets, strict=True):
                shape = torch.tensor([len(ids), len(source)])
                parts = torch.cat([shape, ids, source, target]).numpy().tobytes()
                named.append(hashlib.blake2b(parts, digest_size=16).digest())
            vars(self)["_names"] = tuple(named)
        return vars(self)["_names"]

    def sums(self, scores: Float[Tensor, "t"]) -> Float[Tensor, "s"]:
        """Sum per sequence of one score per scored token, in an order that does not depend on the device."""
        table = scores.new_zeros(self.ids.shape)
        return table.index_put((self.row, self.source), scores).sum(dim=-1)

    def beside_whole(self, rows: Int[Tensor, "q"]) -> "ScoredSequences":
        """These, and after them those of `rows` once more with every token but the first scored.

        Over a prefix tree the model computes nothing twice for that.
        """
        everything = F.pad(self.ids, (0, 1)).index_put((self.row, self.source + 1), self.target)[rows]
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        row, source = (place < self.real[rows, None]).nonzero(as_tuple=True)
        return ScoredSequences(
            ids=torch.cat([self.ids, self.ids[rows]]),
            row=torch.cat([self.row, row + len(self.ids)]),
            source=torch.cat([self.source, source]),
            target=torch.cat([self.target, everything[row, source + 1]]),
            length=torch.cat([self.length, self.real[rows]]),
            real=torch.cat([self.real, self.real[rows]]),
        )

    def inputs(self) -> list[Int[Tensor, "_"]]:
        """Each row without its padding, on the CPU."""
        return [ids[:n] for ids, n in zip(self.ids.cpu(), self.real.tolist(), strict=True)]

    def unique_tokens(self) -> int:
        """How many tokens there are if every prefix that sequences share is counted once."""
        trees = vars(self).get("_trees", {}).values()
        return next((tree.unique for tree in trees), None) or len(
            PrefixTree.from_sequences(self.inputs()).ids
        )


@dataclass(frozen=True)
class ScoredTree(TensorDataclass):
    """Scored sequences as a tree of `unique` tokens: what is scored twice, after the same past, stands once.

    `source` is the token of the tree that a score is read at, `target` what is scored, and `entry` holds for
    each of the sequences' scored tokens its place among those.
    """

    layout: TreeLayout
    unique: int
    source: Int[Tensor, "e"]
    target: Int[Tensor, "e"]
    entry: Int[Tensor, "t"]

    @classmethod
    def of(cls, sequences: ScoredSequences, plan: TreeOptions) -> "ScoredTree":
        device = sequences.ids.device
        tree = PrefixTree.from_sequences(sequences.inputs())
        row, place, target = (t.cpu() for t in (sequences.row, sequences.source, sequences.target))
        source = tree.path[tree.start[row] + place]
        scored, entry = torch.unique(torch.stack([source, target]), dim=1, return_inverse=True)
        layout = TreeLayout.from_tree(tree, plan)
        return cls(layout, len(tree.ids), scored[0], scored[1], entry).to(device)


def sides_of(sequences: ScoredSequences) -> Int[Tensor, "p 2"]:
    """The pairs of a stack of all chosen sequences and then all rejected ones."""
    places = torch.arange(len(sequences.ids), device=sequences.ids.device)
    return rearrange(places, "(side p) -> p side", side=2)


@jaxtyped(typechecker=beartype)
@dataclass(frozen=True)
class PreferenceBatch(TensorDataclass):
    """Sequences and the pairs among them: row `k` of `pairs` holds the indices of chosen and rejected.

    `step_pairs`, `step_chosen_tokens` and `step_whole_tokens` count the valid pairs, their scored chosen
    tokens, and all tokens of these but the first, for a whole optimizer step, where this batch is a part of
    it: losses are then divided by these, so that the parts' losses add up to the loss of the whole.
    `pair_weights` multiply the pairs' losses, and `margins` (in nats) are subtracted inside the sigmoid or
    hinge of losses that have one.
    """

    sequences: ScoredSequences
    pairs: Int[Tensor, "p 2"]
    step_pairs: int | None = None
    step_chosen_tokens: int | None = None
    step_whole_tokens: int | None = None
    pair_weights: Float[Tensor, "p"] | None = None
    margins: Float[Tensor, "p"] | None = None

    @classmethod
    def from_padded(
        cls,
        seqs: tuple[Int[Tensor, "b n"], Int[Tensor, "b m"]],
        prompts: tuple[Bool[Tensor, "b n"], Bool[Tensor, "b m"]],
        reals: tuple[Bool[Tensor, "b n"], Bool[Tensor, "b m"]],
        pair_weights: Float[Tensor, "b"] | None = None,
        margins: Float[Tensor, "b"] | None = None,
    ) -> "PreferenceBatch":
        """Chosen and rejected rows, each with its own prompt and padding mask, as one stack of sequences."""
        width = max(seqs[0].shape[1], seqs[1].shape[1])

        def stacked(sides: tuple[Tensor, Tensor]) -> Tensor:
            return torch.cat([F.pad(side, (0, width - side.shape[1])) for side in sides])

        sequences = ScoredSequences.from_padded(stacked(seqs), ~stacked(prompts), stacked(reals))
        return cls(sequences, sides_of(sequences), pair_weights=pair_weights, margins=margins)

    @classmethod
    def from_lists(
        cls,
        prompts: Sequence[Ids],
        chosen: Sequence[Ids],
        rejected: Sequence[Ids],
        pair_weights: Float[Tensor, "b"] | None = None,
        margins: Float[Tensor, "b"] | None = None,
    ) -> "PreferenceBatch":
        """Two completions for each prompt, all as token ids."""
        sequences = ScoredSequences.from_lists([*prompts, *prompts], [*chosen, *rejected])
        return cls(sequences, sides_of(sequences), pair_weights=pair_weights, margins=margins)

    @property
    def valid(self) -> Bool[Tensor, "p"]:
        """Pairs both of whose sides have a scored token."""
        return (self.sequences.length[self.pairs] > 0).all(dim=-1)

    def counts(self) -> tuple[int, int, int]:
        """What `as_part_of` takes of a whole step: of the valid pairs here the number, the scored tokens on
        their chosen sides, and all tokens of these sides but the first."""
        chosen = self.pairs[self.valid, 0]
        return len(chosen), int(self.sequences.length[chosen].sum()), int(self.sequences.real[chosen].sum())

    def as_part_of(
        self, step_pairs: int, step_chosen_tokens: int, step_whole_tokens: int
    ) -> "PreferenceBatch":
        return replace(
            self,
            step_pairs=step_pairs,
            step_chosen_tokens=step_chosen_tokens,
            step_whole_tokens=step_whole_tokens,
        )
