"""A LoRA adapter alone, for llama.cpp and Ollama, which apply it to a GGUF file of the base."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from dpo_wrapper.commands.export.agreement import TOLERANCES, PromptOutput
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.gguf.adapter_file import write_adapter_file
from dpo_wrapper.commands.export.gguf.adapter_reader import load_checked
from dpo_wrapper.commands.export.gguf.base_file import copy_adapter, is_float32, load_base_file
from dpo_wrapper.commands.export.gguf.base_template import save_template, writes_otherwise
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.fresh_base import check_on_fresh_base
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import check_by_llama_cpp
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

ROUNDED_ACTIVATIONS = 0.05
"""By how much of their spread logits may differ where weights are not in float32, as llama.cpp rounds
activations then: in a model of 30 layers by 0.017 with 4 bits, by 0.021 with 8, by 0.0006 with 16."""


def write_gguf_adapter(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write `adapter.gguf`, and try it on the base: on a GGUF file of it where `--base` names one.

    `check_adapter` has seen both. PEFT's configuration and the tokenizer beside it are for loading the folder
    here again.
    """
    origin, model = source.require_adapter("gguf --adapter"), cast(Any, source.pretrained.model)
    factors, file = list_lora_factors(model, "gguf --adapter"), folder / GGUF_ADAPTER
    base = model.get_base_model()
    write_adapter_file(factors, file, find_family(base), base.config, origin.base)
    save_adapter_config(model.peft_config[model.active_adapter], origin, folder)
    source.tokenizer.save(folder)
    command, notes = ["llama-cli", "-m", str(config.base or "BASE.gguf"), "--lora", str(file)], []
    if config.base is not None and writes_otherwise(config.base, source):
        command += ["--jinja", "--chat-template-file", str(save_template(source, folder))]
        notes.append(OTHER_TEMPLATE)
    checks = list_checks(source, config, factors, file)
    return Exported(folder, checks, [shlex.join(command)], notes)


def list_checks(
    source: ExportSource, config: ExportConfig, factors: Sequence[LoraFactors], file: Path
) -> list[Check]:
    """The file read back, and llama.cpp, each on the base, or on the weights in the GGUF file of the base.

    With quantized weights llama.cpp rounds activations as well, by as much as some adapters change: it is
    tried on the same weights in float32 too.
    """
    base, tolerance = cast(Any, source.pretrained.model).get_base_model(), TOLERANCES["float32"]
    if config.base is None:
        outputs = source.outputs
        load_base = partial(load_in_float32, find_on_hub(source.require_adapter("gguf").base))
    else:
        load_base = partial(load_base_file, config.base, base.config)
        outputs = answer_on(source, load_base(), config)

    def open_reader() -> ModuleReader:
        return ModuleReader(
            "PEFT, of the factors read back", lambda: load_checked(file.parent, load_base(), factors)
        )

    checks = [Check(open_reader, tolerance, outputs=outputs)]
    tolerance += find_family(base).llama_cpp_rounding
    if config.base is None or not is_float32(config.base):
        checks.append(check_on_fresh_base(file, load_base, source.tokenizer, outputs, tolerance))
        tolerance = ROUNDED_ACTIVATIONS
    if config.base is not None and checks[-1].open_reader is not None:
        checks.append(check_by_llama_cpp(config.base, outputs, tolerance, lora_path=file, expected=outputs))
    return checks


def answer_on(source: ExportSource, base: nn.Module, config: ExportConfig) -> tuple[PromptOutput, ...]:
    """What the adapter says on another base."""
    model = copy_adapter(source.pretrained.model, base)
    return replace(source, pretrained=replace(source.pretrained, model=model)).answer(config).outputs
