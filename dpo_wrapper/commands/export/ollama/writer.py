"""A GGUF file with the Modelfile that Ollama makes a model of."""

import re
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dpo_wrapper.commands.export.agreement import ExportError, Reader
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.gguf.model_file import MODEL_FILE
from dpo_wrapper.commands.export.gguf.writer import write_gguf
from dpo_wrapper.commands.export.ollama.bos import adds_bos_token
from dpo_wrapper.commands.export.ollama.modelfile import Modelfile, parse_modelfile
from dpo_wrapper.commands.export.ollama.ollama_template import (
    OllamaTemplate,
    make_plain_template,
    make_template,
)
from dpo_wrapper.commands.export.ollama.tokens import check_tokens
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.pretrained.gguf_adapter import GGUF_ADAPTER

MODELFILE = "Modelfile"

WriteGGUF = Callable[[ExportSource, Path, ExportConfig], Exported]


def write_ollama(
    source: ExportSource, folder: Path, config: ExportConfig, write: WriteGGUF = write_gguf
) -> Exported:
    """Write a GGUF file and the Modelfile for it.

    Args:
        source: the model.
        folder: for the files.
        config: with `adapter`, the file is that of the adapter, on the base that it names.
        write: writes the GGUF file.

    Raises:
        ValueError: the model has no GGUF file, or Ollama cannot write its dialogues.
    """
    tokenizer = check_ollama(source, config)
    exported = write(source, folder, config)
    model_file = folder / MODEL_FILE if config.base is None else config.base.absolute()
    template = describe(source, tokenizer, adds_bos=adds_bos_token(model_file))
    modelfile = Modelfile(
        base=str(model_file) if config.adapter else f"./{MODEL_FILE}",
        adapter=f"./{GGUF_ADAPTER}" if config.adapter else "",
        template=template.text,
        system=template.system,
        stops=template.stops,
    )
    write_whole(folder / MODELFILE, modelfile.format())

    def check(reader: Reader) -> None:
        found = read_modelfile(folder / MODELFILE, modelfile)
        check_tokens(found.template, source, tokenizer, reader, adds_bos=adds_bos_token(model_file))

    name = name_model(source.name)
    usage = [f"ollama create {name} -f {shlex.quote(str(folder / MODELFILE))}", f"ollama run {name}"]
    checks = [with_modelfile(one, check) for one in exported.checks]
    return Exported(folder, checks, usage, [*exported.notes, *template.notes])


def check_ollama(source: ExportSource, config: ExportConfig) -> HuggingFaceTokenizer:
    """The tokenizer of a model that has a Modelfile; ValueError if there is none."""
    tokenizer = source.tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            f"--to ollama needs a Hugging Face tokenizer, but {source.name} reads bytes: use --to merged."
        )
    if config.adapter and config.base is None:
        raise ValueError(
            "--to ollama with --adapter needs the model that the adapter stands on, but --base is missing: "
            "give the GGUF file of it, or leave --adapter out."
        )
    describe(source, tokenizer, adds_bos=False)
    return tokenizer


def describe(source: ExportSource, tokenizer: HuggingFaceTokenizer, *, adds_bos: bool) -> OllamaTemplate:
    """What Ollama needs to know of the tokenizer, with all ends that the model's settings name."""
    settings: Any = getattr(source.pretrained.model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    end_ids = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if not source.is_chat:
        return make_plain_template(tokenizer, end_ids)
    return make_template(tokenizer, end_ids, adds_bos=adds_bos)


def name_model(name: str) -> str:
    """A name that Ollama takes for a model."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(name).resolve().name.lower()).strip("-._") or "model"


def with_modelfile(check: Check, check_modelfile: Callable[[Reader], None]) -> Check:
    """A check that reads the Modelfile as well."""
    open_reader = check.open_reader
    if open_reader is None:
        return check

    def open_both() -> Reader:
        reader = open_reader()
        try:
            check_modelfile(reader)
        except BaseException:
            reader.close()
            raise
        return reader

    return replace(check, open_reader=open_both)


def read_modelfile(file: Path, expected: Modelfile) -> Modelfile:
    """What a Modelfile says; ExportError unless it is what was written."""
    try:
        found = parse_modelfile(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(str(error)) from error
    for field in fields(Modelfile):
        value, given = getattr(found, field.name), getattr(expected, field.name)
        if value != given:
            raise ExportError(
                f"the Modelfile should have {given!r} as its {field.name}, but it has {value!r}: do not use "
                "it."
            )
    return found
