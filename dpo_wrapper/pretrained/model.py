"""A language model with its tokenizer, and the files of its folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.models import language_model

if TYPE_CHECKING:
    from dpo_wrapper.pretrained.adapter import AdapterOrigin

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
RUN_FILE = "run.json"
"""In the folder of a training run: its settings, and whether its model is saved."""
EXPORT_FILE = "export.json"
"""In the folder of an export: what it was made of, and whether it agrees with that."""


@dataclass(frozen=True)
class PretrainedModel:
    """A language model with its tokenizer.

    Attributes:
        decoder_args: of an x-transformers decoder, as `build_decoder` takes them; None for another model.
        adapter: where the adapter that trains comes from; None if the model itself trains.
    """

    model: nn.Module
    tokenizer: Tokenizer
    tokenizer_name: str
    decoder_args: dict[str, Any] | None
    adapter: "AdapterOrigin | None" = None

    @property
    def num_embeddings(self) -> int:
        """The number of token ids that the model has an embedding for."""
        if self.decoder_args is not None:
            return int(self.decoder_args["num_tokens"])
        return len(self.model.get_input_embeddings().weight)  # type: ignore[operator]

    @property
    def max_positions(self) -> int | None:
        """The length of the model's table of positions; None if it has none."""
        return language_model(self.model).max_positions


def read_settings(name: str) -> dict[str, Any]:
    """The config.json of a model folder, which holds no unfinished run; empty if `name` is no folder."""
    if not Path(name).is_dir():
        return {}
    folder = Path(name)
    check_finished(folder)
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise ValueError(
            f"--model should be the folder of a run or of a Hugging Face model, but {name} holds no "
            f"{CONFIG_FILE}: give the folder that does."
        )
    return json.loads(config_file.read_text(encoding="utf-8"))


def check_finished(folder: Path) -> None:
    """ValueError if a folder holds a run whose model is not trained yet, or an export that is of no use."""
    check_export(folder)
    if read_run(folder).get("status") == "training":
        remedy = f"resume it, or use {folder}/sft" if (folder / "sft").is_dir() else "resume it"
        raise ValueError(f"--model should be a finished run, but {folder} has not finished: {remedy}.")


def check_export(folder: Path) -> None:
    """ValueError if a folder holds an export that does not agree with its model."""
    export = read_export(folder)
    if export.get("status", "verified") != "verified":
        why = "differs from it" if export["status"] == "differs" else "was not finished"
        raise ValueError(
            f"--model should be an export that agrees with its model, but that in {folder} {why}: export "
            f"{export.get('model')} again."
        )


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a training run's folder; empty if there is none that can be read."""
    return read_dict(folder / RUN_FILE)


def read_export(folder: Path) -> dict[str, Any]:
    """The export.json of an export's folder; empty if there is none that can be read."""
    return read_dict(folder / EXPORT_FILE)


def read_dict(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
