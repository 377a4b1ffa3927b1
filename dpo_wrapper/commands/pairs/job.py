"""What pairs are made of: the files, the model and the options, on which the result depends."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from dpo_wrapper.commands.pairs.config import PairsConfig
from dpo_wrapper.commands.pairs.progress_file import check_settings, read_settings
from dpo_wrapper.data.files import find_sources
from dpo_wrapper.data.prepare.job import describe_source
from dpo_wrapper.data.prepared import as_json_option
from dpo_wrapper.data.whole_files import hash_file
from dpo_wrapper.evaluation.judges import IMPLICIT, is_function
from dpo_wrapper.pretrained import read_run
from dpo_wrapper.pretrained.adapter import find_base, is_adapter_folder

OPTIONS = (
    "columns", "split", "as_chat", "chat_template_kwargs", "allow_empty", "on_bad_row", "tokenizer",
    "max_length", "max_prompt_length", "on_long", "model", "sample_from", "num_samples", "judge", "keep",
    "max_new_tokens", "temperature", "top_p", "top_k", "seed", "batch_size", "dtype", "cpu",
)  # fmt: skip
"""The options that the result depends on, but for files."""


@dataclass(frozen=True)
class PairsJob:
    """What pairs are made of.

    Attributes:
        settings: what the result depends on, as JSON has it.
        today: the date for templates that print one, that on which the work began; None for that of the run.
    """

    settings: Mapping[str, Any]
    today: date | None

    @classmethod
    def plan(cls, config: PairsConfig) -> "PairsJob":
        """Look at the files; ValueError if one is not as it should be, or work began with other options."""
        path = progress_path(config.out)
        begun = read_settings(path)
        today = date.fromisoformat(begun["date"]) if begun else date.today()
        template = config.chat_template
        settings = {name: as_json_option(getattr(config, name)) for name in OPTIONS}
        settings |= {
            "logs": [describe_source(source) for source in find_sources(config.data)],
            "files of the model": describe_model(config.model),
            "chat_template": None if template is None else hash_file(template),
            "date": today.isoformat(),
        }
        if begun:
            check_settings(begun, settings, path)
        return cls(settings, None if read_run(Path(config.model)).get("today") else today)


def progress_path(out: Path) -> Path:
    """The file with the samples until all pairs are there."""
    return out.with_name(f"{out.name}.progress")


def describe_judge(name: str) -> list[Any]:
    """What tells a judge from one of the same name whose files have changed."""
    if name.startswith(IMPLICIT):
        return [name, describe_model(name.removeprefix(IMPLICIT))]
    return [name, describe_model(name.rpartition(":")[0] if is_function(name) else name)]


def describe_model(name: str) -> list[Any]:
    """Sizes and times of the files that a model is loaded from, where these are here."""
    names = [name]
    while is_adapter_folder(names[-1]):
        names.append(find_base(names[-1]))
    return [describe_files(Path(name)) for name in names]


def describe_files(path: Path) -> list[Any]:
    """Name, size and time of a file, or of each file right in a folder; empty if nothing is there."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
