"""`dpo-wrapper prepare --out DIR`: tokenize data once, check it, and write it for training.

Files are prepared part by part in a work folder inside the output folder, by any number of processes, whose
parts do not depend on one another. When all parts are there, the main process joins them, and writes the
manifest last. What a process that was killed has finished is used by the next one.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_wrapper.data.examples import TokenizedExamples
from dpo_wrapper.data.lint import Finding, format_findings
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.data.prepare.job import PrepareJob, find_difference
from dpo_wrapper.data.prepare.join import REFUSED_FILE, REPORT_FILE, join_parts, remove_parts
from dpo_wrapper.data.prepare.part_maker import is_written
from dpo_wrapper.data.prepare.parts import Part, read_parts
from dpo_wrapper.data.prepare.workers import make_in_workers
from dpo_wrapper.data.prepared import MANIFEST_FILE, PreparedData, is_prepared, read_manifest
from dpo_wrapper.data.preview import print_examples
from dpo_wrapper.data.readers import format_ignored_spans, format_margins
from dpo_wrapper.data.whole_files import try_lock
from dpo_wrapper.data.writable import check_writable


@dataclass(frozen=True)
class Processes:
    """The processes that share the work: those of torchrun or accelerate launch, or one.

    Attributes:
        rank, count: of this process, over all machines.
        num_local: processes on this machine.
    """

    rank: int = 0
    count: int = 1
    num_local: int = 1

    @classmethod
    def from_launcher(cls) -> "Processes":
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ.get(name, default)) for name, default in zip(names, "011", strict=True)))


def prepare_data(config: PrepareConfig) -> PreparedData | None:
    """Prepare data as `dpo-wrapper prepare` does; data that is prepared already is opened.

    Returns None in processes other than the first, which do not wait for it.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about the setting or the row that is wrong.
    """
    assert config.out is not None
    if prepared := next(filter(is_prepared, config.data), None):
        problem = f"--data should be files, but {prepared} is prepared data already"
        raise ValueError(f"{problem}: train on it, or name the files that it was made of.")
    processes = Processes.from_launcher()
    job = PrepareJob.plan(config)
    if (manifest := read_manifest(config.out)) is not None:
        if difference := find_difference(manifest, job):
            problem = f"--out should be a new folder or hold the same data, but {config.out} has {difference}"
            raise ValueError(f"{problem}: name a new folder, or delete it.")
        print(f"{config.out} holds this data already, prepared with these options: nothing is done.")
        if processes.rank == 0:
            remove_parts(config.out)  # for what made the data may have been killed before it did
        return PreparedData.open(config.out)
    check_writable(config.out)
    check_folder(config.out)
    try:
        make_and_join_parts(job, processes)
    except OSError as error:
        problem = f"--out should be a folder that can be written, but {config.out} cannot ({error})"
        raise ValueError(f"{problem}: mend that, and the same command goes on.") from error
    return None if processes.rank else PreparedData.open(config.out)


def make_and_join_parts(job: PrepareJob, processes: Processes) -> None:
    """Make the parts of this process; the first process also waits for those of the others and joins all."""
    job = job.agree_on_date()
    with lock_file(job.folder / f"lock-{processes.rank}"):
        num_parts = make_parts(job, processes)
        if not processes.rank:
            wait_for_parts(job.folder, num_parts)
            join_parts(job, num_parts)


@contextmanager
def lock_file(file: Path) -> Iterator[None]:
    """Hold a lock, which ends with this process; ValueError if another process holds it."""
    with file.open("wb") as stream:
        if not try_lock(stream):
            problem = f"one process should prepare {file.parent.parent}, but another is doing so"
            raise ValueError(f"{problem}: wait for it, or stop it.")
        yield


def prepare_and_report(config: PrepareConfig) -> bool:
    """Prepare data, and print what became of its rows and what was found; True if that is a problem."""
    data = prepare_data(config)
    if data is None:
        return False
    if config.preview:
        preview_prepared(replace(config, data=(data.folder,)))
    else:
        print(format_manifest(data.manifest))
    print(f"The data is in {data.folder}, and {REPORT_FILE} there shows it.")
    return any(finding["is_problem"] for finding in data.manifest["findings"])


def preview_prepared(config: PrepareConfig) -> None:
    """Print the first examples of prepared data, and what became of the rows that it was made of."""
    data = PreparedData.open(config.data[0])
    name = config.tokenizer or data.manifest["tokenizer"]["name"]
    tokenizer = replace(config, tokenizer=name).load_tokenizer(data.template_date)
    data.check_tokenizer(tokenizer)
    print_examples(data.examples, 3 if config.preview is None else config.preview, tokenizer)
    print(format_manifest(data.manifest))


def format_manifest(manifest: Mapping[str, Any]) -> str:
    """What became of the rows, and the findings, problems first."""
    counts = manifest["counts"]
    read, written, refused, duplicates = (
        counts[name] for name in ("read", "written", "refused", "duplicates")
    )
    lines = [
        f"Rows: {read:,} read = {written:,} written + {refused:,} refused + {duplicates:,} duplicates.",
        "Examples: "
        + ", ".join(f"{count:,} {name}" for name, count in manifest["dataset_types"].items())
        + ".",
    ]
    if refused:
        lines.append(f"{REFUSED_FILE} says which rows are refused, and why.")
    if manifest["unused_columns"]:
        lines.append("Columns that were not used: " + ", ".join(manifest["unused_columns"]) + ".")
    if manifest["ignored_spans"]:
        lines.append(format_ignored_spans(manifest["ignored_spans"]))
    if manifest["margins"]:
        lines.append(format_margins(manifest["margins"]))
    cuts = {f"num_{name}": count for name, count in manifest["cuts"].items()}
    lines += filter(None, [TokenizedExamples([], **cuts).summary()])
    findings = [Finding(**finding) for finding in manifest["findings"]]
    return "\n".join([*lines, format_findings(findings)])


def check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that holds something else than the parts of prepared data."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if not is_own_file(name)]
    if others:
        problem = f"--out should be a new or empty folder, but {folder} holds {others[0]}"
        raise ValueError(f"{problem}: name a new folder.")


def is_own_file(name: str) -> bool:
    """Whether `prepare` may have left a file or folder of this name when it was killed."""
    return name.startswith(("work-", "data-", "refused.jsonl", "report.html", MANIFEST_FILE))


def make_parts(job: PrepareJob, processes: Processes) -> int:
    """Make the parts of this process that are not there yet; returns the number of all parts."""
    from tqdm import tqdm

    num_parts = 0

    def own_parts() -> Iterator[Part]:
        nonlocal num_parts
        for part in read_parts(job.sources, job.config.fields, job.config.split):
            num_parts = part.number + 1
            if part.number % processes.count == processes.rank:
                if job.is_done(part.number):
                    progress.update(len(part.rows))
                else:
                    yield part

    is_hidden = processes.rank > 0
    total = None if is_hidden else job.count_rows()
    with tqdm(desc="prepare", unit=" rows", total=total, disable=is_hidden, smoothing=0) as progress:
        workers = job.config.workers or max(1, count_cores() // processes.num_local)
        for count in make_in_workers(job, own_parts(), workers):
            progress.update(count)
    return num_parts


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_for_parts(folder: Path, num_parts: int) -> None:
    """Wait until other processes have made their parts."""
    from tqdm import tqdm

    missing = list(range(num_parts))
    with tqdm(desc="other processes", unit=" parts", total=num_parts, disable=None, delay=1) as progress:
        while True:
            missing = [number for number in missing if not is_written(folder, number)]
            progress.update(num_parts - len(missing) - progress.n)
            if not missing:
                return
            time.sleep(0.2)
