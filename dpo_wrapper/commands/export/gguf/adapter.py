"""A LoRA adapter alone, for llama.cpp and Ollama, which apply it to a GGUF file of the base."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dpo_wrapper.commands.export.agreement import TOLERANCES, PromptOutput
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.gguf.adapter_file import write_adapter_file
from dpo_wrapper.commands.export.gguf.adapter_reader import load_checked
from dpo_wrapper.commands.export.gguf.base_file import (
    check_base_file,
    copy_adapter,
    find_tolerance,
    has_head,
    load_base_file,
)
from dpo_wrapper.commands.export.gguf.base_template import save_template, writes_otherwise
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.fresh_base import check_on_fresh_base
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import check_by_llama_cpp
from dpo_wrapper.commands.export.gguf.tensors import has_tied_head
from dpo_wrapper.commands.export.lora_factors import LoraFactors, list_lora_factors
from dpo_wrapper.commands.export.merged import load_in_float32
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.libraries.hub import find_on_hub
from dpo_wrapper.pretrained.adapter import save_adapter_config
from dpo_wrapper.pretrained.gguf_adapter import GGUF_ADAPTER

OTHER_TEMPLATE = (
    "the base's file writes dialogues otherwise than the model has learned them: the command gives llama.cpp "
    "the template of the training"
)


def write_gguf_adapter(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write `adapter.gguf`, and try it on the base: on a GGUF file of it where `--base` names one.

    PEFT's configuration and the tokenizer beside it are for loading the folder here again.

    Raises:
        ValueError: llama.cpp cannot apply the adapter, or not to that file.
    """
    origin, model = source.require_adapter("gguf --adapter"), source.pretrained.model
    factors = list_lora_factors(model, "gguf --adapter")
    base: Any = model.get_base_model()  # type: ignore[operator]
    family, file = find_family(base), folder / GGUF_ADAPTER
    if config.base is not None:
        check_base_file(config.base, base, family, origin.base)
    has_own_head = has_head(config.base) if config.base is not None else not has_tied_head(base)
    write_adapter_file(factors, file, family, base.config, origin.base, has_own_head=has_own_head)
    save_adapter_config(model.peft_config[model.active_adapter], origin, folder)  # type: ignore[operator,index]
    source.tokenizer.save(folder)
    command, notes = ["llama-cli", "-m", str(config.base or "BASE.gguf"), "--lora", str(file)], []
    if config.base is not None and writes_otherwise(config.base, source):
        command += ["--jinja", "--chat-template-file", str(save_template(source, folder))]
        notes.append(OTHER_TEMPLATE)
    checks = list_checks(source, config, origin.base, file, factors)
    return Exported(folder, checks, [shlex.join(command)], notes)


def list_checks(
    source: ExportSource, config: ExportConfig, base: str, file: Path, factors: Sequence[LoraFactors]
) -> list[Check]:
    """The file read back, and llama.cpp, each on the GGUF file of the base, if one is named, or on the base.

    On a file with quantized weights it should say what PEFT's adapter says on these weights in float32.
    """
    if config.base is None:
        outputs, load_base = source.outputs, partial(load_in_float32, find_on_hub(base))
        by_llama_cpp = check_on_fresh_base(file, load_base, source)
    else:
        load_base = partial(load_base_file, config.base, source.pretrained.model.config)
        outputs = answer_on(source, load_base(), config)
        tolerance = find_tolerance(config.base)
        by_llama_cpp = check_by_llama_cpp(config.base, outputs, tolerance, lora_path=file, expected=outputs)

    def open_reader() -> ModuleReader:
        return ModuleReader(
            "PEFT, of the factors read back", lambda: load_checked(file.parent, load_base(), factors)
        )

    return [Check(open_reader, TOLERANCES["float32"], outputs=outputs), by_llama_cpp]


def answer_on(source: ExportSource, base: nn.Module, config: ExportConfig) -> tuple[PromptOutput, ...]:
    """What the adapter says on another base."""
    model = copy_adapter(source.pretrained.model, base)
    return replace(source, pretrained=replace(source.pretrained, model=model)).answer(config).outputs
