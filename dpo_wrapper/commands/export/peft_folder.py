"""The adapter as PEFT reads it."""

from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.commands.export.agreement import TOLERANCES
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.commands.export.weights import WeightDigests
from dpo_wrapper.libraries.hub import find_on_hub
from dpo_wrapper.pretrained import save_pretrained


def write_peft(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write the adapter, on the base that it names, with the tokenizer.

    Raises:
        ValueError: the model has no adapter, or one that stands on another.
    """
    origin = source.require_adapter("peft")
    weights = WeightDigests.of(source.pretrained.model, torch.float32)
    save_pretrained(source.pretrained, source.pretrained.model, folder)

    def load() -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(find_on_hub(origin.base), dtype=torch.float32)
        return PeftModel.from_pretrained(base, str(folder))

    usage = [f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{origin.base}"), "{folder}")']
    check = Check(lambda: ModuleReader("PEFT", load, weights), TOLERANCES["float32"])
    return Exported(folder, [check], usage, [weights.note])
