"""The weights of an x-transformers decoder, with the lines that load them."""

import json
from pathlib import Path
from typing import Any

from dpo_wrapper.commands.export.agreement import TOLERANCES
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.pretrained import save_pretrained
from dpo_wrapper.pretrained.model import CONFIG_FILE, WEIGHTS_FILE


def write_x_transformers(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write weights, arguments and tokenizer; the three lines that load them are run to check them.

    Raises:
        ValueError: it is no model of x-transformers.
    """
    if source.kind != "x_transformers":
        raise ValueError(
            f"--to x-transformers should be given for a model of x-transformers, but {source.name} is one of "
            "Hugging Face: use --to merged."
        )
    save_pretrained(source.pretrained, source.pretrained.model, folder)
    lines = format_loading(folder)

    def load() -> Any:
        names: dict[str, Any] = {}
        exec("\n".join(lines), names)
        return names["model"]

    return Exported(
        folder, [Check(lambda: ModuleReader("x-transformers", load), TOLERANCES["float32"])], lines
    )


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
