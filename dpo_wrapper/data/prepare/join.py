"""Parts of prepared data -> the finished folder: Arrow files, refused rows, the report and the manifest."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.example_table import ExampleTable, write_batches
from dpo_wrapper.data.examples import DATASET_TYPES
from dpo_wrapper.data.files import import_pyarrow
from dpo_wrapper.data.lint import Finding, find_problems
from dpo_wrapper.data.lint.near_duplicates import find_first
from dpo_wrapper.data.prepare.job import PrepareJob
from dpo_wrapper.data.prepare.part_maker import PartCounts, part_file, read_counts
from dpo_wrapper.data.prepare.report_page import write_report
from dpo_wrapper.data.prepared import FORMAT, MANIFEST_FILE
from dpo_wrapper.data.readers import missing_column_error
from dpo_wrapper.data.whole_files import flush_to_disk, hash_file, hash_text, write_whole
from dpo_wrapper.version import __version__

MAX_FILE_EXAMPLES = 1_000_000
"""Examples of an Arrow file."""

NUM_SHOWN = 8
"""Rows that a page shows as a sample."""

REFUSED_FILE, REPORT_FILE = "refused.jsonl", "report.html"


def join_parts(job: PrepareJob, num_parts: int) -> None:
    """Write the finished folder, the manifest last, and delete the parts.

    Raises:
        ValueError: nothing is left to train on, or no row has a column that is named.
    """
    folder = job.config.out
    assert folder is not None
    counts = PartCounts()
    for number in range(num_parts):
        part_counts = read_counts(job.folder, number)
        assert part_counts is not None
        counts.add(part_counts)
    check_columns(job, counts, num_parts)
    rows = select_rows(job, num_parts)
    num_rows = {
        "read": counts.num_rows,
        "written": rows.count,
        "refused": len(counts.refused),
        "duplicates": counts.num_rows - len(counts.refused) - rows.count,
    }
    if not rows.count:
        first = counts.refused[0]
        problem = f"the data should have rows to train on, but all {counts.num_rows:,} are refused"
        raise ValueError(f"{problem}, the first because of this: {first['reason'].removesuffix('.')}.")
    write_whole(folder / REFUSED_FILE, "".join(json.dumps(entry) + "\n" for entry in counts.refused))
    files = write_files(job, num_parts, rows.selected)
    table = ExampleTable.open([folder / file["name"] for file in files])
    cuts = {name.removeprefix("num_"): count for name, count in counts.tokens.items()}
    findings = find_problems(rows.features, {**num_rows, **cuts, "tied": counts.num_tied})
    manifest = {
        "format": FORMAT,
        "dpo_wrapper": __version__,
        **job.identity,
        "options": job.options,
        "template": {"date": job.today.isoformat()},
        "dataset_types": count_types(table),
        "counts": {**num_rows, "examples": len(table)},
        "longest": counts.longest,
        "largest_id": counts.largest_id,
        "cuts": cuts,
        "forms": counts.forms,
        "unused_columns": sorted(counts.unused_columns),
        "ignored_spans": counts.num_ignored_spans,
        "margins": int(np.isfinite(table.column("margin")).sum()) if table.has_values("margin") else 0,
        "findings": [asdict(finding) for finding in findings],
        "files": files,
        "fingerprint": hash_text("".join(file["hash"] for file in files)),
    }
    shown = choose_shown(findings, rows.first_examples)
    examples = {row: table[int(rows.first_examples[row])] for row in shown}
    tokenizer = job.config.load_tokenizer(job.today)
    write_report(folder / REPORT_FILE, manifest, findings, rows.features, examples, tokenizer)
    for file in files:
        flush_to_disk(folder / file["name"])
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    remove_parts(folder)


def remove_parts(folder: Path) -> None:
    """Remove what finished data was made of."""
    for work in folder.glob("work-*"):
        shutil.rmtree(work, ignore_errors=True)


def check_columns(job: PrepareJob, counts: PartCounts, num_parts: int) -> None:
    """Raise ValueError if a column that is named is in no row."""
    missing = next((name for name, count in counts.missing_columns.items() if count == num_parts), None)
    if missing is not None:
        raise missing_column_error(missing, job.config.fields)


def choose_shown(findings: Sequence[Finding], first_examples: NDArray[np.int64]) -> list[int]:
    """The rows that a page shows: those of findings, and a sample of all."""
    sample = np.linspace(0, len(first_examples) - 1, NUM_SHOWN).astype(int).tolist()
    return sorted({*sample, *(row for finding in findings for row in finding.rows)})


@dataclass(frozen=True)
class SelectedRows:
    """The rows that are written.

    Attributes:
        features: their measures, as `measure_rows` makes them.
        selected: which examples of each part are written; None for all.
        first_examples: Int[n], index of the first example of each row of `features` among those written.
        count: number of rows of the files.
    """

    features: dict[str, NDArray[Any]]
    selected: list[NDArray[np.bool_] | None]
    first_examples: NDArray[np.int64]
    count: int


def select_rows(job: PrepareJob, num_parts: int) -> SelectedRows:
    """The rows of all parts; with --dedupe those that equal an earlier one are left out."""
    parts = []
    for number in range(num_parts):
        with np.load(part_file(job.folder, number, "npz")) as arrays:
            parts.append(dict(arrays))
    part_numbers = np.repeat(np.arange(num_parts), [len(part["row"]) for part in parts])
    names = list(parts[0])
    features = {name: np.concatenate([part.pop(name) for part in parts]) for name in names}
    kept = find_first(features["content_digest"]) if job.config.dedupe else np.ones(len(part_numbers), bool)
    num_examples = features.pop("num_examples")
    starts = np.searchsorted(part_numbers, np.arange(num_parts + 1))
    selected = []
    for start, end in pairwise(starts):
        part = kept[start:end]
        selected.append(None if part.all() else np.repeat(part, num_examples[start:end]))
    rows = np.stack([part_numbers, features.pop("row")])[:, kept]
    count = int((np.diff(rows) != 0).any(axis=0).sum()) + min(1, rows.shape[1])
    if not kept.all():
        features = {name: values[kept] for name, values in features.items()}
        num_examples = num_examples[kept]
    return SelectedRows(features, selected, np.cumsum(num_examples) - num_examples, count)


def write_files(
    job: PrepareJob, num_parts: int, selected: list[NDArray[np.bool_] | None]
) -> list[dict[str, Any]]:
    """Write the Arrow files; returns name, bytes and hash of each."""
    folder = job.config.out
    assert folder is not None
    for file in folder.glob("data-*.arrow"):  # of a process that was killed
        file.unlink()
    sizes: Counter[int] = Counter()

    def number_of_file(batch: Any) -> int:
        number = sizes.total() // MAX_FILE_EXAMPLES
        sizes[number] += batch.num_rows
        return number

    files = []
    for number, batches in groupby(read_batches(job, num_parts, selected), number_of_file):
        file = folder / f"data-{number:05}.arrow"
        write_batches(file, batches)
        files.append({"name": file.name, "bytes": file.stat().st_size, "hash": hash_file(file)})
    return files


def read_batches(job: PrepareJob, num_parts: int, selected: list[NDArray[np.bool_] | None]) -> Iterator[Any]:
    """The record batches of all parts, without the examples that are left out."""
    pa = import_pyarrow()
    for number in range(num_parts):
        with pa.memory_map(str(part_file(job.folder, number, "arrow"))) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
            mask = selected[number]
            if mask is not None:
                batch = batch.filter(pa.array(mask))
            if batch.num_rows:
                yield batch


def count_types(table: ExampleTable) -> dict[str, int]:
    counts = np.bincount(table.dataset_types, minlength=len(DATASET_TYPES)).tolist()
    return {name: count for name, count in zip(DATASET_TYPES, counts, strict=True) if count}
