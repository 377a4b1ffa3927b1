"""A folder of prepared data: Arrow files of an `ExampleTable`, and a manifest that says what made them."""

import json
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_wrapper.data.example_table import ExampleTable
from dpo_wrapper.data.tokens.tokenizers import ByteTokenizer, Tokenizer

MANIFEST_FILE = "manifest.json"
FORMAT = "dpo_wrapper prepared data"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PreparedData:
    """Prepared data: the manifest of a folder, and its examples.

    The manifest is written last, so that a folder without one is no prepared data. It holds:
        format, version: of this layout;
        dataset_types: the number of examples of each;
        counts: of rows, read = written + refused + duplicates, and `examples`, which are more than `written`
            where long documents became several;
        tokenizer, template: what made the tokens, with hashes, and the date that a template was given;
        options: how rows were read and cut;
        input: the files that were read, and a hash of their contents;
        files: the Arrow files, with their sizes;
        fingerprint: a hash of the Arrow files;
        longest, largest_id: of all sequences;
        findings: what was noticed in the data.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "PreparedData":
        """Open a folder.

        Raises:
            ValueError: it holds no whole prepared data, or that of another version.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            problem = f"{folder} should be a folder of prepared data, but it holds no {MANIFEST_FILE}"
            raise ValueError(f"{problem}: run dpo-wrapper prepare --out {folder} to the end.")
        if manifest.get("format") != FORMAT:
            problem = f"{folder}/{MANIFEST_FILE} should say '{FORMAT}', but it does not"
            raise ValueError(f"{problem}: name a folder that dpo-wrapper prepare has written.")
        if manifest.get("version") != FORMAT_VERSION:
            versions = f"version {FORMAT_VERSION}, but it has version {manifest.get('version')}"
            raise ValueError(f"{folder} should be prepared data of {versions}: prepare it again.")
        for file in manifest["files"]:
            path = folder / file["name"]
            size = path.stat().st_size if path.is_file() else 0
            if size != file["bytes"]:
                problem = f"{path} should have {file['bytes']:,} bytes, but it has {size:,}"
                raise ValueError(f"{problem}: delete the folder and prepare the data again.")
        return cls(folder, manifest)

    @cached_property
    def examples(self) -> ExampleTable:
        """All examples, mapped into memory."""
        files = [self.folder / file["name"] for file in self.manifest["files"]]
        return ExampleTable.open(files, self.manifest["largest_id"])

    @property
    def template_date(self) -> date:
        """The date that a chat template was given."""
        return date.fromisoformat(self.manifest["template"]["date"])

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError unless the tokenizer makes the same tokens, and says of what it differs."""
        made, given = self.manifest["tokenizer"], describe_tokenizer(tokenizer)
        has_templates = ByteTokenizer().template_fingerprint() not in (made["template"], given["template"])
        if has_templates and made["template"] != given["template"]:
            raise ValueError(
                f"{self.folder} should be prepared with the model's own chat template, but it was made with "
                f"another, that of '{made['name']}': prepare the data with the model's tokenizer, or give "
                "the same --chat-template and --chat-template-kwargs."
            )
        if made["fingerprint"] != given["fingerprint"]:
            raise ValueError(
                f"{self.folder} should be prepared with the model's own tokenizer, but it was made with "
                f"another, that of '{made['name']}': prepare the data with --tokenizer and the model's name."
            )


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """Hashes of what determines the ids: the tokenizer, and how its chat template writes dialogues."""
    return {"template": tokenizer.template_fingerprint(), "fingerprint": tokenizer.fingerprint()}


def as_json_option(value: Any) -> Any:
    """An option as the manifest has it."""
    return list(value) if isinstance(value, tuple) else value


def format_option(value: Any) -> str:
    """An option of the manifest in words."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a folder that `dpo-wrapper prepare` has written or was writing."""
    folder = Path(path)
    return (folder / MANIFEST_FILE).is_file() or any(folder.glob("work-*/date"))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None if it has none.

    Raises ValueError if the file cannot be read.
    """
    file = folder / MANIFEST_FILE
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} should be JSON, but it cannot be read ({error}): prepare the data again."
        ) from error
    return manifest if isinstance(manifest, dict) else {}
