"""Token pairs as a torch Dataset, and batches of them as the arguments of the model call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .encode import EncodedRows, TokenPair, encode_rows
from .files import OnError, PathLike, read_rows
from .rows import DEFAULT_FIELDS, Fields, RowError
from .tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


class PreferenceItem(NamedTuple):
    """One pair: two sides of Int[n], padded on the right, and Bool[n], True on the tokens of the prompt."""

    preferred_seq: Tensor
    unpreferred_seq: Tensor
    prompt_mask: Tensor


class PreferenceItemWithColumns(NamedTuple):
    """The same of a data set with weights (1 where a row has none) or margins (0 there), each a Float[].

    None for a column that no row has.
    """

    preferred_seq: Tensor
    unpreferred_seq: Tensor
    prompt_mask: Tensor
    pair_weight: Tensor | None
    margin: Tensor | None


class PreferenceDataset(Dataset[PreferenceItem | PreferenceItemWithColumns]):
    """Pairs as `PreferenceItem`s: int64 ids of one width, the longer side's, or `pad_to` where given.

    pad_id fills the right; -100 and other ids that are no token are welcome. A side that begins or ends
    with pad_id as a token of its own is refused, so that a trailing run of pad_id is the padding, all of
    it. With `pad_to` every item has the same width and torch's default collate makes batches of them. If any
    row has a weight or a margin, the items are `PreferenceItemWithColumns`.

    encoded: what `from_file` left out and shortened; None for a dataset made of pairs.

    ValueError for such pairs, for sides without a token, and for a pad_to below the longest side.
    """

    def __init__(self, pairs: Sequence[TokenPair], pad_id: int, *, pad_to: int | None = None) -> None:
        for pair in pairs:
            problem = _pad_problem(pair, pad_id)
            if problem:
                raise ValueError(f"{pair.where}: {problem}" if pair.where else problem)
        longest = max(map(_width, pairs), default=0)
        if pad_to is not None and pad_to < longest:
            remedy = "raise pad_to or encode with a smaller max_length"
            raise ValueError(
                f"expected pad_to to be at least the longest side, {longest}, got {pad_to}; {remedy}"
            )
        self.pairs = pairs
        self.weighted = any(pair.weight is not None for pair in pairs)
        self.with_margins = any(pair.margin is not None for pair in pairs)
        self.pad_id = pad_id
        self.pad_to = pad_to
        self.encoded: EncodedRows[TokenPair] | None = None

    @classmethod
    def from_file(
        cls,
        path: PathLike | Sequence[PathLike],
        tokenizer: Tokenizer | str | None = None,
        max_length: int = 1024,
        fields: Fields = DEFAULT_FIELDS,
        on_error: OnError = "raise",
        pad_id: int | None = None,
        *,
        pad_to: int | None = None,
    ) -> "PreferenceDataset":
        """Reads, encodes and wraps the pairs of a file.

        tokenizer: None for bytes, a tokenizer, or what `load_tokenizer` takes. pad_id: the tokenizer's
        unless given.

        ValueError for what `read_rows` and `encode_rows` refuse, a pad_id that is the EOS, or no usable pair.
        """
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = ByteTokenizer() if tokenizer is None else load_tokenizer(tokenizer)
        pad_id = tokenizer.pad_id if pad_id is None else pad_id
        if pad_id in (tokenizer.eos_id, tokenizer.bos_id):
            wanted, remedy = "a pad_id that is neither EOS nor BOS", "use -100, which is no token"
            raise ValueError(f"expected {wanted}, got {pad_id}, which would hide real tokens; {remedy}")
        rows, errors = read_rows(path, fields, on_error=on_error)
        encoded = encode_rows(rows, tokenizer, max_length, on_error=on_error)
        errors += encoded.errors
        if on_error == "skip":
            problems = [(pair, _pad_problem(pair, pad_id)) for pair in encoded.entries]
            errors += [RowError(f"{pair.where}: {problem}") for pair, problem in problems if problem]
            encoded = replace(encoded, entries=[pair for pair, problem in problems if not problem])
        encoded = replace(encoded, errors=errors)
        if not encoded.entries:
            remedy = f"the first error is: {errors[0]}" if errors else "add rows whose two sides differ"
            raise ValueError(f"expected pairs to train on, got none ({encoded.summary()[:-1]}); {remedy}")
        dataset = cls(encoded.entries, pad_id, pad_to=pad_to)
        dataset.encoded = encoded
        return dataset

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> PreferenceItem | PreferenceItemWithColumns:
        pair = self.pairs[index]
        width = _width(pair) if self.pad_to is None else self.pad_to
        sides = torch.full((2, width), self.pad_id, dtype=torch.long)
        for side, completion in zip(sides, (pair.chosen, pair.rejected), strict=True):
            ids = pair.prompt + completion
            side[: len(ids)] = torch.tensor(ids)
        item = PreferenceItem(sides[0], sides[1], torch.arange(width) < len(pair.prompt))
        if not (self.weighted or self.with_margins):
            return item
        weight = torch.tensor(1.0 if pair.weight is None else pair.weight) if self.weighted else None
        margin = torch.tensor(pair.margin or 0.0) if self.with_margins else None
        return PreferenceItemWithColumns(*item, weight, margin)


def _width(pair: TokenPair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def _pad_problem(pair: TokenPair, pad_id: int) -> str | None:
    for name, completion in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        ids = (*pair.prompt, *completion)
        if not ids:
            return f"expected at least one token in the {name} sequence, got none; leave the row out"
        if pad_id in (ids[0], ids[-1]):
            end = "begin" if ids[0] == pad_id else "end"
            wanted = f"a {name} sequence that does not {end} with the pad_id {pad_id}"
            return (
                f"expected {wanted}, got it as a token there; choose a pad_id that is no token, such as -100"
            )
    return None


def _kind(dtype: torch.dtype) -> str:
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


def _columns(items: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Weights and margins of items that have them; the items of one dataset all have the same."""
    rich = [item for item in items if isinstance(item, PreferenceItemWithColumns)]
    if len(rich) < len(items):
        return {}
    columns = {"pair_weights": [x.pair_weight for x in rich], "margins": [x.margin for x in rich]}
    full = {name: [x for x in column if x is not None] for name, column in columns.items()}
    return {name: torch.stack(column) for name, column in full.items() if len(column) == len(items)}


@dataclass(frozen=True)
class PreferenceCollator:
    """Items to the keyword arguments of the model call.

    The trailing padding of each side is stripped, and each side padded to its own longest:
        preferred_seq: Int[b n], unpreferred_seq: Int[b m],
        prompt_mask: (Bool[b n], Bool[b m]), seq_mask: (Bool[b n], Bool[b m]), True on real tokens.
    and, of items that have them, pair_weights: Float[b], margins: Float[b].
    Padded places are False in both masks and hold pad_id, or 0 where that is no token (negative).

    ValueError for an empty list, for items that are not three tensors of one length, and for an item that
    begins with pad_id: items are padded on the right.
    """

    pad_id: int
    padding_side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        if self.padding_side not in ("right", "left"):
            raise ValueError(
                f"expected padding_side 'right' or 'left', got {self.padding_side!r}; choose one of them"
            )

    def __call__(self, items: Sequence[Sequence[Any]]) -> dict[str, Any]:
        if not items:
            raise ValueError("expected at least one item, got none; collate batches that are not empty")
        columns = _columns(items)
        items = [item[:3] if isinstance(item, PreferenceItemWithColumns) else item for item in items]
        for number, item in enumerate(items):
            self._check(item, number)
        preferred = self._side([(chosen, mask) for chosen, _, mask in items])
        unpreferred = self._side([(rejected, mask) for _, rejected, mask in items])
        seqs, prompt_masks, seq_masks = zip(preferred, unpreferred, strict=True)
        return {
            "preferred_seq": seqs[0],
            "unpreferred_seq": seqs[1],
            "prompt_mask": prompt_masks,
            "seq_mask": seq_masks,
            **columns,
        }

    def _check(self, item: Sequence[Tensor], number: int) -> None:
        wanted = "(preferred_seq, unpreferred_seq, prompt_mask) of one length, integers, integers and bool"
        got = [f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__ for t in item]
        tensors = len(item) == 3 and all(isinstance(part, Tensor) and part.dim() == 1 for part in item)
        kinds = [_kind(part.dtype) for part in item] if tensors else []
        if kinds != ["int", "int", "bool"] or len({len(part) for part in item}) != 1:
            remedy = "collate the items of a PreferenceDataset"
            raise ValueError(f"expected {wanted}, got {', '.join(got)} as item {number}; {remedy}")

    def _side(self, sides: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        lengths = [self._length(seq) for seq, _ in sides]
        shape = (len(sides), max(*lengths, 1))
        seqs = torch.full(shape, max(self.pad_id, 0), dtype=torch.long)
        prompt_mask, seq_mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for row, ((seq, mask), length) in enumerate(zip(sides, lengths, strict=True)):
            start = 0 if self.padding_side == "right" else shape[1] - length
            real = slice(start, start + length)
            seqs[row, real], prompt_mask[row, real], seq_mask[row, real] = seq[:length], mask[:length], True
        return seqs, prompt_mask, seq_mask

    def _length(self, seq: Tensor) -> int:
        real = (seq != self.pad_id).nonzero()
        if len(real) and int(seq[0]) == self.pad_id:
            remedy = "pad items on the right only, with an id that is no token"
            raise ValueError(f"expected items that begin with a token, got pad_id {self.pad_id}; {remedy}")
        return int(real[-1]) + 1 if len(real) else 0
