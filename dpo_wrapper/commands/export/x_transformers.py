"""The weights of an x-transformers decoder, with the lines that load them."""

import json
from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.commands.export.agreement import TOLERANCES
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.commands.export.weights import WeightDigests
from dpo_wrapper.pretrained import save_pretrained
from dpo_wrapper.pretrained.model import CONFIG_FILE, WEIGHTS_FILE


def write_x_transformers(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write weights, arguments and tokenizer; the three lines that load them are run to check them.

    Its adapter is merged before, if it has one.
    """
    source = source.merge()
    weights = WeightDigests.of(source.pretrained.model, torch.float32)
    save_pretrained(source.pretrained, source.pretrained.model, folder)
    lines = format_loading(folder)

    def load() -> Any:
        names: dict[str, Any] = {}
        exec("\n".join(lines), names)
        return names["model"]

    check = Check(lambda: ModuleReader("x-transformers", load, weights), TOLERANCES["float32"])
    return Exported(folder, [check], lines, [weights.note])


def format_loading(folder: Path) -> list[str]:
    """Three lines of Python that load the model by x-transformers and safetensors alone."""
    arguments = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["x_transformers"]
    layers = ", ".join(f"{name}={value!r}" for name, value in arguments["attn_layers"].items())
    others = ", ".join(f"{name}={value!r}" for name, value in arguments.items() if name != "attn_layers")
    return [
        "from x_transformers import TransformerWrapper, Decoder; from safetensors.torch import load_model",
        f"model = TransformerWrapper({others}, attn_layers=Decoder({layers}))",
        f"load_model(model, {str(folder / WEIGHTS_FILE)!r})",
    ]
