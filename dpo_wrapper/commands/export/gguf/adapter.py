"""A LoRA adapter alone, for llama.cpp and Ollama, which apply it to a GGUF file of the base."""

import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

from dpo_wrapper.commands.export.agreement import TOLERANCES, PromptOutput, compute_outputs
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.gguf.adapter_file import write_adapter_file
from dpo_wrapper.commands.export.gguf.adapter_reader import AdapterFileReader
from dpo_wrapper.commands.export.gguf.base_file import check_base_file, load_base_file
from dpo_wrapper.commands.export.lora_factors import list_lora_factors
from dpo_wrapper.commands.export.source import ExportSource

ADAPTER_FILE = "adapter.gguf"


def write_gguf_adapter(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write `adapter.gguf`, and try it on the base: on a GGUF file of it where `--base` names one.

    Raises:
        ValueError: llama.cpp cannot apply the adapter, or not to that file.
    """
    base = source.require_adapter("gguf --adapter").base
    model: Any = source.pretrained.model
    factors = list_lora_factors(model, "gguf --adapter")
    file = folder / ADAPTER_FILE
    outputs: list[PromptOutput] = list(source.outputs)
    notes = []
    if config.base is not None:
        check_base_file(config.base, model.get_base_model(), base)
    write_adapter_file(factors, file, model.get_base_model().config, base)
    if config.base is not None:
        model = deepcopy(model)
        load_base_file(model.get_base_model(), config.base)
        outputs = compute_outputs(
            model, source.tokenizer, config.prompts, config.num_tokens, as_chat=source.is_chat
        )
    checks = [
        Check(lambda: AdapterFileReader(file, model, factors), TOLERANCES["float32"], outputs=tuple(outputs))
    ]
    named = shlex.quote(str(config.base)) if config.base else "BASE.gguf"
    usage = [f"llama-cli -m {named} --lora {shlex.quote(str(file))}"]
    return Exported(folder, checks, usage, notes)
