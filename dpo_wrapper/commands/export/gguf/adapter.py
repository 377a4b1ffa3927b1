"""A LoRA adapter alone, for llama.cpp and Ollama, which apply it to a GGUF file of the base."""

import shlex
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dpo_wrapper.commands.export.agreement import TOLERANCES, compute_outputs
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.gguf.adapter_file import write_adapter_file
from dpo_wrapper.commands.export.gguf.adapter_reader import load_checked
from dpo_wrapper.commands.export.gguf.base_file import (
    check_base_file,
    copy_adapter,
    has_head,
    load_base_file,
)
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import check_by_llama_cpp
from dpo_wrapper.commands.export.gguf.tensors import has_tied_head
from dpo_wrapper.commands.export.lora_factors import list_lora_factors
from dpo_wrapper.commands.export.merged import load_in_float32
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.pretrained.adapter import save_adapter_config
from dpo_wrapper.pretrained.gguf_adapter import GGUF_ADAPTER


def write_gguf_adapter(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write `adapter.gguf`, and try it on the base: on a GGUF file of it where `--base` names one.

    PEFT's configuration and the tokenizer beside it are for loading the folder here again.

    Raises:
        ValueError: llama.cpp cannot apply the adapter, or not to that file.
    """
    origin, model = source.require_adapter("gguf --adapter"), source.pretrained.model
    factors = list_lora_factors(model, "gguf --adapter")
    base: Any = model.get_base_model()  # type: ignore[operator]
    family, base_config = find_family(base), base.config
    if config.base is None:
        has_own_head = not has_tied_head(base)
    else:
        check_base_file(config.base, base, family, origin.base)
        has_own_head = has_head(config.base)
    file = folder / GGUF_ADAPTER
    write_adapter_file(factors, file, family, base_config, origin.base, has_own_head=has_own_head)
    save_adapter_config(model.peft_config[model.active_adapter], origin, folder)  # type: ignore
    source.tokenizer.save(folder)
    if config.base is None:
        load, outputs = partial(load_in_float32, origin.base), source.outputs
    else:
        load = partial(load_base_file, config.base, base_config)
        outputs = answer_on(load(), source, config)

    def open_reader() -> ModuleReader:
        return ModuleReader("PEFT, of the factors read back", lambda: load_checked(folder, load(), factors))

    checks = [Check(open_reader, TOLERANCES["float32"], outputs=outputs)]
    if config.base is not None:
        checks.append(check_by_llama_cpp(config.base, outputs, 1e9, lora_path=file, expected=outputs))
    named = shlex.quote(str(config.base)) if config.base else "BASE.gguf"
    usage = [f"llama-cli -m {named} --lora {shlex.quote(str(file))}"]
    return Exported(folder, checks, usage)


def answer_on(base: nn.Module, source: ExportSource, config: ExportConfig):
    """What the adapter says on another base."""
    model = copy_adapter(source.pretrained.model, base)
    return tuple(
        compute_outputs(model, source.tokenizer, config.prompts, config.num_tokens, as_chat=source.is_chat)
    )
