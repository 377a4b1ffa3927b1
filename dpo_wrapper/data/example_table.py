"""Tokenized examples as Arrow record batches, in memory or mapped from files."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_wrapper.data.examples import DATASET_TYPES, TokenizedExample
from dpo_wrapper.data.files import import_pyarrow

BATCH_ROWS = 4096
"""Rows of a batch in memory; the tokens of a batch are counted in 32 bits."""


@dataclass(frozen=True)
class TableRow:
    """A tokenized example with what is known of the row that it was made of.

    `split` is 'train', 'test' or None, and `prompt_digest` a hash of the prompt's text (see `prompt_digest`).
    """

    example: TokenizedExample
    split: str | None = None
    prompt_digest: int = 0


class ExampleTable(Sequence[TokenizedExample]):
    """Tokenized examples of any dataset type, one a row.

    Every row is a set of sequences, the prompt with each of its completions, of which spans are scored. An
    example is built when it is asked for, from arrays that its batch has in memory or in a mapped file.

        dataset_type: how the sequences meet in a loss
        prompt: list<int32>
        completions: list<list<int32>>
        scored_spans: list<list<int32>>, for each completion starts and ends of spans of prompt and completion
            together, as in [start, end, start, end]; null if all tokens of the completions are scored
        label, weight, margin, ranks: as in `Example`, or null
        is_cut: as in `TokenizedExample`
        split: train, test or null
        source: the place of the row that the example was made of
        prompt_digest: uint64, equal for equal prompts
    """

    def __init__(
        self, batches: Iterable[Any], files: Sequence[Path] = (), largest_id: int | None = None
    ) -> None:
        self.batches = [_BatchArrays(batch) for batch in batches]
        self.files = tuple(files)
        self._largest_id = largest_id
        self._ends = list(accumulate(len(batch) for batch in self.batches))

    @classmethod
    def from_rows(cls, rows: Sequence[TableRow]) -> "ExampleTable":
        """A table in memory."""
        return cls(make_batch(rows[at : at + BATCH_ROWS]) for at in range(0, len(rows), BATCH_ROWS))

    @classmethod
    def open(cls, files: Sequence[Path], largest_id: int | None = None) -> "ExampleTable":
        """A table in Arrow files, mapped into memory. A copy in another process maps them again.

        `largest_id` is that of all rows if it is known, so that not all of them have to be read for it.
        """
        pa = import_pyarrow()
        readers = [pa.ipc.open_file(pa.memory_map(str(file))) for file in files]
        batches = (reader.get_batch(k) for reader in readers for k in range(reader.num_record_batches))
        return cls(batches, files, largest_id)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.files:
            return ExampleTable.open, (self.files, self._largest_id)
        return ExampleTable, (self.record_batches,)

    @property
    def record_batches(self) -> list[Any]:
        return [batch.batch for batch in self.batches]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"the table has {len(self)} examples, but {index} is asked for.")
        batch, row = self._find(index % len(self))
        return batch.example(row)

    def _find(self, index: int) -> tuple["_BatchArrays", int]:
        number = bisect_right(self._ends, index)
        return self.batches[number], int(index) - (self._ends[number] - len(self.batches[number]))

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """The values of a column that holds no lists; numbers and bools that are null are NaN or None."""
        parts = [batch.batch.column(name).to_numpy(zero_copy_only=False) for batch in self.batches]
        return np.concatenate(parts) if parts else np.zeros(0)

    def has_values(self, name: str) -> bool:
        """Whether a column has a value in any row."""
        return any(batch.batch.column(name).null_count < len(batch) for batch in self.batches)

    @property
    def dataset_types(self) -> np.ndarray[Any, Any]:
        """The dataset type of each row, as an index into `DATASET_TYPES`."""
        return np.concatenate([np.zeros(0, np.int8), *(batch.dataset_types for batch in self.batches)])

    def num_completions(self) -> np.ndarray[Any, Any]:
        """Int[n]."""
        return np.concatenate([np.zeros(0, int), *(np.diff(batch.row_offsets) for batch in self.batches)])

    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of the prompt with the longest completion of each row, Int[n]."""
        return np.concatenate([np.zeros(0, int), *(batch.lengths() for batch in self.batches)])

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of all rows; -1 if there are no tokens."""
        if self._largest_id is not None:
            return self._largest_id
        arrays = (ids for batch in self.batches for ids in (batch.prompt_ids, batch.ids))
        return max((int(ids.max()) for ids in arrays if len(ids)), default=-1)


class _BatchArrays:
    """The columns of a record batch as arrays."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        prompt, completions, spans, ranks = (
            batch.column(name) for name in ("prompt", "completions", "scored_spans", "ranks")
        )
        self.prompt_offsets, self.prompt_ids = _as_arrays(prompt)
        self.row_offsets = completions.offsets.to_numpy()
        self.offsets, self.ids = _as_arrays(completions.values)
        self.spans = spans if spans.null_count < len(batch) else None
        self.ranks = ranks if ranks.null_count < len(batch) else None
        types = batch.column("dataset_type")
        order = [DATASET_TYPES.index(name) for name in types.dictionary.to_pylist()]
        self.dataset_types = np.array(order, np.int8)[types.indices.to_numpy()]
        self.sources = batch.column("source")
        self.numbers = [
            batch.column(name).to_pylist() if batch.column(name).null_count < len(batch) else None
            for name in ("label", "weight", "margin")
        ]
        self.is_cut = batch.column("is_cut")

    def __len__(self) -> int:
        return self.batch.num_rows

    def example(self, row: int) -> TokenizedExample:
        start, end = self.prompt_offsets[row : row + 2].tolist()
        prompt = tuple(self.prompt_ids[start:end].tolist())
        first, last = self.row_offsets[row : row + 2].tolist()
        offsets = self.offsets[first : last + 1].tolist()
        completions = tuple(tuple(self.ids[start:end].tolist()) for start, end in pairwise(offsets))
        label, weight, margin = (None if column is None else column[row] for column in self.numbers)
        scored = None
        if self.spans is not None and (spans := self.spans[row].as_py()) is not None:
            scored = tuple(
                spans_to_mask(bounds, len(prompt) + len(completion))
                for bounds, completion in zip(spans, completions, strict=True)
            )
        ranks = None if self.ranks is None else self.ranks[row].as_py()
        return TokenizedExample(
            prompt, completions, label, weight, margin, self.sources[row].as_py(), (), scored,
            None if ranks is None else tuple(ranks),
            DATASET_TYPES[self.dataset_types[row]] == "language_modeling",
            self.is_cut[row].as_py(),
        )  # fmt: skip

    def lengths(self) -> np.ndarray[Any, Any]:
        longest = np.maximum.reduceat(np.diff(self.offsets), self.row_offsets[:-1])
        return np.diff(self.prompt_offsets) + longest


def _as_arrays(lists: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The offsets and the values of an array of lists of numbers."""
    return lists.offsets.to_numpy(), lists.values.to_numpy()


def make_batch(rows: Sequence[TableRow]) -> Any:
    """A record batch with the columns of `ExampleTable`."""
    pa = import_pyarrow()
    examples = [row.example for row in rows]
    completions = [ids for example in examples for ids in example.completions]
    spans = [
        None if example.scored is None else [mask_to_spans(mask) for mask in example.scored]
        for example in examples
    ]
    types = [DATASET_TYPES.index(example.dataset_type) for example in examples]
    columns = {
        "dataset_type": pa.DictionaryArray.from_arrays(pa.array(types, pa.int8()), list(DATASET_TYPES)),
        "prompt": _list_array([example.prompt for example in examples]),
        "completions": pa.ListArray.from_arrays(
            _offsets([len(example.completions) for example in examples]), _list_array(completions)
        ),
        "scored_spans": pa.array(spans, pa.list_(pa.list_(pa.int32()))),
        "label": pa.array([example.label for example in examples], pa.bool_()),
        "weight": pa.array([example.weight for example in examples], pa.float64()),
        "margin": pa.array([example.margin for example in examples], pa.float64()),
        "ranks": pa.array([example.ranks for example in examples], pa.list_(pa.float64())),
        "is_cut": pa.array([example.is_cut for example in examples], pa.bool_()),
        "split": pa.array([row.split for row in rows], pa.string()),
        "source": pa.array([example.source for example in examples], pa.string()),
        "prompt_digest": pa.array([row.prompt_digest for row in rows], pa.uint64()),
    }
    return pa.RecordBatch.from_pydict(columns)


def write_batches(file: Path, batches: Iterable[Any]) -> None:
    """Write record batches of one schema, at least one, to an Arrow file."""
    pa = import_pyarrow()
    batches = iter(batches)
    first = next(batches)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)


def _list_array(lists: Sequence[Sequence[int]]) -> Any:
    pa = import_pyarrow()
    lengths = [len(ids) for ids in lists]
    ids = np.fromiter(chain.from_iterable(lists), np.int32, sum(lengths))
    return pa.ListArray.from_arrays(_offsets(lengths), pa.array(ids))


def _offsets(lengths: Sequence[int]) -> Any:
    return import_pyarrow().array(np.cumsum([0, *lengths], dtype=np.int32))


def mask_to_spans(mask: Sequence[bool]) -> list[int]:
    """Where a mask becomes True and False, as [start, end, start, end]."""
    bounds = np.flatnonzero(np.diff(np.array([False, *mask, False]).astype(np.int8)))
    return bounds.tolist()


def spans_to_mask(spans: Sequence[int], length: int) -> tuple[bool, ...]:
    """The mask of which `mask_to_spans` made these spans."""
    mask = np.zeros(length, bool)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        mask[start:end] = True
    return tuple(mask.tolist())
