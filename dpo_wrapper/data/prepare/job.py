"""What is prepared, and how: the files, the options and the tokenizer, on which the result depends."""

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from dpo_wrapper.data.examples import DatasetType
from dpo_wrapper.data.files import JSON_LINES, Source, find_sources, import_pyarrow
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.data.prepare.part_maker import PartMaker, read_counts
from dpo_wrapper.data.prepared import FORMAT_VERSION, as_json_option, describe_tokenizer
from dpo_wrapper.data.readers import RecordParser, read_raw_records
from dpo_wrapper.data.tokens.options import TokenizeOptions
from dpo_wrapper.data.whole_files import hash_file, hash_text

OPTIONS = (
    "columns", "split", "score", "as_chat", "chat_template_kwargs", "kind", "max_length", "max_prompt_length",
    "on_long", "allow_empty",
)  # fmt: skip
"""The options that the parts depend on."""

LATER_OPTIONS = ("on_bad_row", "dedupe")
"""Further options that the result depends on."""


@dataclass(frozen=True)
class PrepareJob:
    """What is prepared from what.

    Attributes:
        sources: the files.
        families: of the rows of each, as in `RecordParser`.
        identity: what the parts depend on, but for the date that a template prints; part of the manifest.
        today: that date.
    """

    config: PrepareConfig
    sources: Sequence[Source]
    families: Sequence[DatasetType | None]
    identity: Mapping[str, Any]
    today: date

    @classmethod
    def plan(cls, config: PrepareConfig) -> "PrepareJob":
        """Look at the files and load the tokenizer; ValueError if either is not as it should be."""
        today = date.today()
        tokenizer = config.load_tokenizer(today)
        sources = find_sources(config.data)
        families = [find_first_family(source, config) for source in sources]
        files = [describe_source(source) for source in sources]
        fingerprint = hash_text(repr([(file["name"], file["hash"]) for file in files]))
        identity = {
            "version": FORMAT_VERSION,
            "tokenizer": {"name": config.tokenizer or "bytes", **describe_tokenizer(tokenizer)},
            "options": {name: as_json_option(getattr(config, name)) for name in OPTIONS},
            "input": {"fingerprint": fingerprint, "files": files},
        }
        return cls(config, sources, families, identity, today)

    @property
    def options(self) -> dict[str, Any]:
        """All options that the result depends on, as the manifest has them."""
        return {name: as_json_option(getattr(self.config, name)) for name in (*OPTIONS, *LATER_OPTIONS)}

    def count_rows(self) -> int | None:
        """The rows of all files; None if one would have to be read for that."""
        counts = [count_rows(source) for source in self.sources]
        return None if None in counts else sum(filter(None, counts))

    @property
    def folder(self) -> Path:
        """The work folder, which has another name for everything that makes other parts."""
        assert self.config.out is not None
        return self.config.out / f"work-{hash_text(repr(self.identity))[:16]}"

    def agree_on_date(self) -> "PrepareJob":
        """The same with the date of the process that began, which stands in the work folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "date"
        own = self.folder / f"date.{platform.node()}.{os.getpid()}"
        own.write_text(self.today.isoformat())
        with suppress(FileExistsError):
            os.link(own, file)
        own.unlink()
        return replace(self, today=date.fromisoformat(file.read_text()))

    def create_maker(self) -> PartMaker:
        config = self.config
        return PartMaker(
            self.folder,
            config.load_tokenizer(self.today),
            TokenizeOptions(**config.tokenize_options),
            config.fields,
            config.kind or "auto",
            self.families,
            config.on_error,
        )

    def is_done(self, number: int) -> bool:
        """Whether the files of a part are there, and have no bad rows if these are to stop the program."""
        counts = read_counts(self.folder, number)
        return counts is not None and not (counts.num_bad and self.config.on_error == "raise")


def find_first_family(source: Source, config: PrepareConfig) -> DatasetType | None:
    """The family of the first usable row of a file, which the others have to have; None if it has none."""
    parser = RecordParser(config.fields, config.kind or "auto", "skip")
    records = read_raw_records(source, config.fields, config.split)
    with closing(records):
        for content, own_split in records:
            parser.parse(content, own_split)
            if parser.family is not None or config.kind is not None:
                break
    return parser.family


def find_difference(manifest: Mapping[str, Any], job: PrepareJob) -> str | None:
    """What differs of the data that a manifest describes, in words; None if it is the same."""
    for name, value in job.options.items():
        if (made := manifest["options"].get(name)) != value:
            return f"data prepared with {name.replace('_', '-')} {made} instead of {value}"
    for part, words in (("version", "another version of the format"), ("input", "data of other files")):
        if manifest[part] != job.identity[part]:
            return words
    names = ("fingerprint", "template")
    if any(manifest["tokenizer"][name] != job.identity["tokenizer"][name] for name in names):
        return f"data prepared with another tokenizer or template, that of '{manifest['tokenizer']['name']}'"
    return None


def describe_source(source: Source) -> dict[str, Any]:
    """Name, size and hash of a source: of a file, of all files of a folder, or of the name of a data set."""
    path = Path(source.path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if source.kind == "hub":
        return {"name": source.name, "bytes": None, "hash": hash_text(source.path)}
    hashes = [hash_file(file) for file in files]
    digest = hashes[0] if len(hashes) == 1 else hash_text(repr(hashes))
    return {"name": source.name, "bytes": sum(file.stat().st_size for file in files), "hash": digest}


def count_rows(source: Source) -> int | None:
    """The rows of a file if they are counted quickly: lines of JSON that is not packed, or Parquet."""
    if source.kind == ".parquet":
        return int(import_pyarrow().parquet.read_metadata(source.path).num_rows)
    if source.kind not in JSON_LINES or not source.path.lower().endswith(JSON_LINES):
        return None
    with open(source.path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
