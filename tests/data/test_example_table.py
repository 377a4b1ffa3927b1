"""Tokenized examples in record batches, in memory and in files."""

import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.data.example_table import (
    DATASET_TYPES,
    ExampleTable,
    TableRow,
    make_batch,
    mask_to_spans,
    spans_to_mask,
    write_batches,
)
from dpo_wrapper.data.examples import TokenizedExample

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)


@st.composite
def examples(draw):
    prompt, completions = draw(IDS), tuple(draw(st.lists(IDS, min_size=1, max_size=4)))
    scored = None
    if draw(st.booleans()):
        lengths = [len(prompt) + len(ids) for ids in completions]
        scored = tuple(tuple(draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in lengths)
    ranks = draw(st.none() | st.just(tuple(float(k) for k in range(len(completions)))))
    label = draw(st.none() | st.booleans()) if len(completions) == 1 else None
    return TokenizedExample(
        prompt,
        completions,
        label=label,
        weight=draw(st.none() | st.floats(0, 9)),
        margin=draw(st.none() | st.floats(-9, 9)),
        source=draw(st.text(max_size=9)),
        scored=scored,
        ranks=ranks,
        is_document=len(completions) == 1 and label is None and draw(st.booleans()),
        is_cut=draw(st.booleans()),
    )


ROWS = st.lists(
    st.builds(TableRow, examples(), st.sampled_from([None, "train", "test"]), st.integers(0, 2**64 - 1)),
    max_size=7,
)


@settings(max_examples=40)
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_examples_come_back_from_memory_and_from_files(tmp_path_factory, batches):
    file = tmp_path_factory.mktemp("table") / "data.arrow"
    write_batches(file, map(make_batch, batches))
    rows = [row for batch in batches for row in batch]
    for table in (ExampleTable.open([file]), ExampleTable.from_rows(rows)):
        assert list(table) == [row.example for row in rows] and len(table) == len(rows)
        assert [one.is_cut for one in table] == [row.example.is_cut for row in rows]
        assert list(pickle.loads(pickle.dumps(table))) == list(table)
        assert table.column("prompt_digest").tolist() == [row.prompt_digest for row in rows]
        assert table.column("split").tolist() == [row.split for row in rows]
        assert [DATASET_TYPES[k] for k in table.dataset_types] == [row.example.dataset_type for row in rows]
        lengths = [len(one.prompt) + max(map(len, one.completions)) for one in table]
        assert table.lengths().tolist() == lengths
        assert table.num_completions().tolist() == [len(one.completions) for one in table]
        ids = [id_ for one in table for ids in (one.prompt, *one.completions) for id_ in ids]
        assert table.largest_id == max(ids, default=-1)
        for name in ("weight", "margin", "label", "ranks"):
            assert table.has_values(name) == any(getattr(one, name) is not None for one in table)


@given(st.lists(st.booleans(), max_size=12))
def test_spans_are_masks(mask):
    spans = mask_to_spans(mask)
    assert list(spans_to_mask(spans, len(mask))) == mask
    assert all(start < end for start, end in zip(spans[::2], spans[1::2], strict=True))
    assert mask_to_spans([False, True, True, False, True]) == [1, 3, 4, 5]


def test_indices_and_slices():
    rows = [TableRow(TokenizedExample((k,), ((1,), (2,)))) for k in range(5)]
    table = ExampleTable([make_batch(rows[:2]), make_batch([]), make_batch(rows[2:])])
    assert [one.prompt[0] for one in table] == [0, 1, 2, 3, 4]
    assert table[-1].prompt == (4,) and table[np.int64(2)].prompt == (2,)
    assert [one.prompt[0] for one in table[1:4:2]] == [1, 3]
    with pytest.raises(IndexError, match="the table has 5 examples, but 5 is asked for"):
        table[5]


def test_other_programs_read_the_file(tmp_path):
    datasets, pd = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    pair = TokenizedExample((1, 2), ((3,), (4, 5)), weight=0.5, source="a.jsonl, line 1")
    masked = replace(pair, scored=((False, True, True), (False, False, True, True)))
    file = tmp_path / "data.arrow"
    write_batches(file, [make_batch([TableRow(pair, "test", 7), TableRow(masked)])])
    frame = pd.read_feather(file)
    assert [ids.tolist() for ids in frame["completions"][0]] == [[3], [4, 5]]
    assert frame["scored_spans"][0] is None and [list(s) for s in frame["scored_spans"][1]] == [
        [1, 3],
        [2, 4],
    ]
    loaded = datasets.load_dataset(
        "arrow", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded[0]["prompt"] == [1, 2] and loaded[0]["dataset_type"] in ("preference", 0)
    table = pa.ipc.open_file(str(file)).read_all()
    assert table.column("prompt_digest").to_pylist() == [7, 0]
