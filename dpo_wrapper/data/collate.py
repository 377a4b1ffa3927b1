"""Tokenized examples, or items of a dataset -> batches, which no other file of `data` imports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq
from typing import Any, Literal

import torch
from torch import Tensor

from dpo_wrapper.batches import (
    PreferenceBatch,
    RankedBatch,
    ScoredSequences,
    SFTBatch,
    TreeOptions,
    UnpairedBatch,
    kl_partner_indices,
)
from dpo_wrapper.data.examples import DatasetType, TokenizedExample

Examples = Sequence[TokenizedExample]

SIDES = ("preferred_seq", "unpreferred_seq")


def group_by_tokens(examples: Examples, max_tokens: int, *, is_padded: bool = False) -> list[list[int]]:
    """Indices in groups of at most `max_tokens` tokens or of one example.

    A prefix that sequences share counts once, and examples come in the order of their prompts, or of their
    ids where they have none: those with long common prefixes together. For a model that pads (`is_padded`),
    each sequence counts as many tokens as the longest of its group, and the longest examples come first.
    """
    if is_padded:
        return _group_by_padded_tokens(examples, max_tokens)
    groups: list[list[int]] = []
    free = 0
    previous: tuple[int, ...] = ()
    beginnings = [example.prompt or example.completions[0] for example in examples]
    for k in sorted(range(len(examples)), key=lambda k: (beginnings[k], k)):
        tokens = len(examples[k].prompt) + sum(map(len, examples[k].completions))
        new_tokens = tokens - sum(takewhile(bool, map(eq, beginnings[k], previous)))
        if not groups or new_tokens > free:
            groups.append([])
            free, new_tokens = max_tokens, tokens
        groups[-1].append(k)
        free -= new_tokens
        previous = beginnings[k]
    return groups


def _group_by_padded_tokens(examples: Examples, max_tokens: int) -> list[list[int]]:
    widths = [max(len(x) + len(y) for x, y, _ in example.sequences) for example in examples]
    groups: list[list[int]] = []
    width = rows = 0
    for k in sorted(range(len(examples)), key=lambda k: (-widths[k], k)):
        new_rows = len(examples[k].sequences)
        if not groups or (rows + new_rows) * width > max_tokens:
            groups.append([])
            width, rows = widths[k], 0
        groups[-1].append(k)
        rows += new_rows
    return groups


class KLExamples(Sequence[TokenizedExample]):
    """Labelled examples, each with the completion of another prompt, by which `KTO` estimates its KL.

    Prompt and KL completion have at most `max_length` tokens together. A prompt that more than half of all
    examples have may find no other.
    """

    def __init__(self, examples: Examples, max_length: int, seed: int = 0) -> None:
        self.examples, self.max_length = examples, max_length
        self.partner_indices = kl_partner_indices([example.prompt for example in examples], seed)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        example, partner = self.examples[index], self.partner_indices[index]
        if partner is None:
            return example
        ids = self.examples[partner].completions[0][: self.max_length - len(example.prompt)]
        return replace(example, kl_completion=ids)


def add_kl_completions(examples: Examples, max_length: int, seed: int = 0) -> Examples:
    """`KLExamples` of examples with a label; the same examples if they have none."""
    has_labels = len(examples) > 0 and examples[0].label is not None
    return KLExamples(examples, max_length, seed) if has_labels else examples


def scored_sequences(
    examples: Examples, max_tokens: int, *, is_padded: bool = False
) -> list[ScoredSequences]:
    """All sequences of the examples, KL completions included, in groups by `group_by_tokens`."""
    indices = group_by_tokens(examples, max_tokens, is_padded=is_padded)
    groups = ([examples[k] for k in group] for group in indices)
    sequences = ([parts for example in group for parts in example.sequences] for group in groups)
    return [ScoredSequences.from_lists(*zip(*parts, strict=True)) for parts in sequences]


# The batches below come with whatever is worked out on the CPU: prefix trees by `tree_options`, and hashes.


def collate_preference(examples: Examples, tree_options: TreeOptions | None = None) -> PreferenceBatch:
    """A batch of examples of two completions."""
    batch = PreferenceBatch.from_lists(
        [example.prompt for example in examples],
        [example.chosen for example in examples],
        [example.rejected for example in examples],
        weights=_stack_values([example.weight for example in examples], default=1.0),
        margins=_stack_values([example.margin for example in examples], default=0.0),
        scored=[example.scored_or_none[side] for side in (0, 1) for example in examples],
    )
    batch.sequences.prebuild_tree(tree_options).content_hashes()
    return batch


def collate_ranked(examples: Examples, tree_options: TreeOptions | None = None) -> RankedBatch:
    """A batch of ranked lists."""
    batch = RankedBatch.from_lists(
        [example.prompt for example in examples],
        [example.completions for example in examples],
        _stack_values([example.weight for example in examples], default=1.0),
        [scored for example in examples for scored in example.scored_or_none],
    )
    batch.sequences.prebuild_tree(tree_options).content_hashes()
    return batch


def collate_unpaired(examples: Examples, tree_options: TreeOptions | None = None) -> UnpairedBatch:
    """A batch of completions with a label."""
    batch = UnpairedBatch.from_lists(
        [example.prompt for example in examples],
        [example.completions[0] for example in examples],
        [bool(example.label) for example in examples],
        [example.kl_completion for example in examples],
        _stack_values([example.weight for example in examples], default=1.0),
        [example.scored_or_none[0] for example in examples],
    )
    for sequences in (batch.sequences, batch.kl_sequences):
        sequences.prebuild_tree(tree_options).content_hashes()
    return batch


def collate_sft(examples: Examples, tree_options: TreeOptions | None = None) -> SFTBatch:
    """Examples of one completion each, which the model learns to write."""
    prompts, completions = [one.prompt for one in examples], [one.completions[0] for one in examples]
    scored = [example.scored_or_none[0] for example in examples]
    sequences = ScoredSequences.from_lists(prompts, completions, scored)
    return SFTBatch(sequences.prebuild_tree(tree_options))


COLLATE_FNS: dict[DatasetType, Callable[..., Any]] = {
    "preference": collate_preference,
    "ranked": collate_ranked,
    "unpaired_preference": collate_unpaired,
}


def _stack_values(values: list[float | None], default: float) -> Tensor | None:
    """A column of weights or margins, `default` where an example has none; None if no example has one."""
    if all(value is None for value in values):
        return None
    return torch.tensor([default if value is None else value for value in values])


@dataclass(frozen=True)
class PreferenceCollator:
    """Items of a `PreferenceDataset` -> the keyword arguments of `DPO.forward`.

    The trailing padding of each side is stripped, and each side padded to its own longest:
        preferred_seq: Int[b n], unpreferred_seq: Int[b m],
        prompt_mask: (Bool[b n], Bool[b m]), seq_mask: (Bool[b n], Bool[b m]), True on real tokens,
    and, if items have them, pair_weights: Float[b], margins: Float[b].
    Padding is False in both masks and holds `pad_id`, or 0 where that is no token (negative).

    Args:
        pad_id: what the items are padded with.
        padding_side: where the batch has its padding.

    Raises:
        ValueError: there is no item, the tensors of one differ in length, or a sequence begins with `pad_id`:
            items are padded on the right.
    """

    pad_id: int
    padding_side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        if self.padding_side not in ("right", "left"):
            problem = f"padding_side should be 'right' or 'left', but it is {self.padding_side!r}"
            raise ValueError(f"{problem}: choose one.")

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not items:
            raise ValueError("there should be at least one item, but there is none: leave the batch out.")
        for number, item in enumerate(items):
            _check_item(item, number)
        seqs, prompt_masks, seq_masks = zip(*(self._pad(items, side) for side in SIDES), strict=True)
        batch: dict[str, Any] = dict(zip(SIDES, seqs, strict=True))
        batch |= {"prompt_mask": prompt_masks, "seq_mask": seq_masks}
        for name in ("pair_weights", "margins"):
            if name in items[0]:
                batch[name] = torch.stack([item[name] for item in items])
        return batch

    def _pad(self, items: Sequence[Mapping[str, Any]], side: str) -> tuple[Tensor, Tensor, Tensor]:
        lengths = [self._real_length(item[side]) for item in items]
        shape = (len(items), max(*lengths, 1))
        seqs = torch.full(shape, max(self.pad_id, 0), dtype=torch.long)
        prompt_mask, seq_mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
            start = 0 if self.padding_side == "right" else shape[1] - length
            real = slice(start, start + length)
            seqs[row, real], seq_mask[row, real] = item[side][:length], True
            mask = item["prompt_mask"]
            prompt_mask[row, real] = (mask if isinstance(mask, Tensor) else mask[SIDES.index(side)])[:length]
        return seqs, prompt_mask, seq_mask

    def _real_length(self, seq: Tensor) -> int:
        real = (seq != self.pad_id).nonzero()
        if len(real) and int(seq[0]) == self.pad_id:
            problem = f"an item should begin with a token, but it begins with the pad_id {self.pad_id}"
            raise ValueError(f"{problem}: pad items on the right only, with an id that is no token.")
        return int(real[-1]) + 1 if len(real) else 0


def _check_item(item: Any, number: int) -> None:
    names = (*SIDES, "prompt_mask")
    parts: list[Any] = [item.get(name) for name in names] if isinstance(item, Mapping) else [item]
    if isinstance(parts[-1], (tuple, list)) and len(parts[-1]) == 2:
        parts[-1:] = parts[-1]
    is_item = (
        all(isinstance(part, Tensor) and part.dim() == 1 and not part.is_floating_point() for part in parts)
        and [part.dtype == torch.bool for part in parts] == [k > 1 for k in range(max(3, len(parts)))]
        and len({len(part) for part in parts}) == 1
    )
    if not is_item:
        kinds = [f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__ for t in parts]
        raise ValueError(
            f"item {number} should have {', '.join(names)} of one length, integers, integers and bool, "
            f"but it has {', '.join(kinds)}: collate the items of a PreferenceDataset."
        )
