"""Load and save a model with its tokenizer, in a form that the model's own library can load."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_wrapper.data.tokens.tokenizers import Tokenizer, load_tokenizer
from dpo_wrapper.models import language_model

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
RUN_FILE = "run.json"
"""In the folder of a training run: its settings, and whether its model is saved."""

PRESETS = {
    "tiny": {"dim": 128, "depth": 4, "heads": 2},
    "small": {"dim": 256, "depth": 6, "heads": 4},
    "medium": {"dim": 512, "depth": 8, "heads": 8},
}
"""Sizes of the decoders that are built from scratch, by name."""


@dataclass(frozen=True)
class PretrainedModel:
    """A language model with its tokenizer.

    Attributes:
        decoder_args: of an x-transformers decoder, as `build_decoder` takes them; None for another model.
    """

    model: nn.Module
    tokenizer: Tokenizer
    tokenizer_name: str
    decoder_args: dict[str, Any] | None

    @property
    def num_embeddings(self) -> int:
        """The number of token ids that the model has an embedding for."""
        if self.decoder_args is not None:
            return int(self.decoder_args["num_tokens"])
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    @property
    def max_positions(self) -> int | None:
        """The length of the model's table of positions; None if it has none."""
        return language_model(self.model).max_positions


def load_pretrained(
    name: str, tokenizer_name: str | None, max_length: int, tokenizer_options: Mapping[str, Any] | None = None
) -> PretrainedModel:
    """Load or build a model in float32, with its tokenizer.

    Args:
        name: one of `PRESETS`, which builds a new decoder; a folder that `save_pretrained` wrote; or a
            Hugging Face causal LM by folder or name.
        tokenizer_name: as in `load_tokenizer`; None for the model's own (bytes for a new decoder).
        max_length: maximum sequence length of a new decoder, in tokens.
        tokenizer_options: as in `load_tokenizer`.

    Raises:
        ValueError: the folder holds no model, or the model cannot be loaded.
    """
    options = tokenizer_options or {}
    if name in PRESETS:
        return build_preset(name, tokenizer_name or "bytes", max_length, options)
    settings = read_settings(name)
    if "x_transformers" in settings:
        return load_decoder(name, settings, tokenizer_name, options)
    return load_hugging_face(name, tokenizer_name or name, options)


def build_preset(
    name: str, tokenizer_name: str, max_length: int, tokenizer_options: Mapping[str, Any]
) -> PretrainedModel:
    """A new decoder with rotary positions, flash attention, RMSNorm and SwiGLU."""
    tokenizer, size = load_tokenizer(tokenizer_name, **tokenizer_options), PRESETS[name]
    decoder_args = {
        "num_tokens": tokenizer.vocab_size,
        "max_seq_len": max_length,
        "use_abs_pos_emb": False,
        "attn_layers": {
            **size,
            "attn_dim_head": size["dim"] // size["heads"],
            "rotary_pos_emb": True,
            "attn_flash": True,
            "use_rmsnorm": True,
            "ff_swish": True,
            "ff_glu": True,
            "ff_no_bias": True,
        },
    }
    return PretrainedModel(build_decoder(decoder_args), tokenizer, tokenizer_name, decoder_args)


def build_decoder(decoder_args: dict[str, Any]) -> nn.Module:
    """`TransformerWrapper(**decoder_args, attn_layers = Decoder(**decoder_args['attn_layers']))`."""
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(**{**decoder_args, "attn_layers": Decoder(**decoder_args["attn_layers"])})


def read_settings(name: str) -> dict[str, Any]:
    """The config.json of a model folder, which holds no unfinished run; empty if `name` is no folder."""
    if not Path(name).is_dir():
        return {}
    folder = Path(name)
    if read_run(folder).get("status") == "training":
        remedy = f"resume it, or use {name}/sft" if (folder / "sft").is_dir() else "resume it"
        raise ValueError(f"--model should be a finished run, but {name} has not finished: {remedy}.")
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise ValueError(
            f"--model should be the folder of a run or Hugging Face model, but {name} holds no {CONFIG_FILE}."
        )
    return json.loads(config_file.read_text(encoding="utf-8"))


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a training run's folder; empty if there is none that can be read."""
    try:
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def load_decoder(
    folder: str, settings: dict[str, Any], tokenizer_name: str | None, tokenizer_options: Mapping[str, Any]
) -> PretrainedModel:
    """The x-transformers decoder in a folder that `save_pretrained` wrote."""
    from safetensors.torch import load_model

    tokenizer_name = tokenizer_name or settings["tokenizer"]
    if tokenizer_name == settings["tokenizer"] == ".":
        tokenizer_name = folder
    model = build_decoder(settings["x_transformers"])
    load_model(model, Path(folder) / WEIGHTS_FILE)
    tokenizer = load_tokenizer(tokenizer_name, **tokenizer_options)
    return PretrainedModel(model, tokenizer, tokenizer_name, settings["x_transformers"])


def load_hugging_face(
    name: str, tokenizer_name: str, tokenizer_options: Mapping[str, Any]
) -> PretrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model should be {', '.join(PRESETS)}, a run folder or a Hugging Face causal LM by folder or "
            f"name, but {name} could not be loaded: {reason}"
        ) from error
    return PretrainedModel(model, load_tokenizer(tokenizer_name, **tokenizer_options), tokenizer_name, None)


def save_pretrained(pretrained: PretrainedModel, model: nn.Module, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer; `load_pretrained(folder)` loads them again.

    The weights of an x-transformers decoder keep its names, and its arguments stand in config.json under
    "x_transformers". A Hugging Face model is saved by its own `save_pretrained`. Of `pretrained` only the
    tokenizer and the kind of the model are used.
    """
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    undo_rescaling(model)
    if pretrained.decoder_args is not None:
        save_model(model, str(folder / WEIGHTS_FILE))
        settings = {
            "x_transformers": pretrained.decoder_args,
            "tokenizer": "bytes" if pretrained.tokenizer_name == "bytes" else ".",
        }
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    else:
        model.save_pretrained(folder)  # type: ignore[operator]
    pretrained.tokenizer.save(folder)


def rescales_in_eval_mode(model: nn.Module) -> bool:
    """Whether a model of transformers (RWKV-4, which has no dropout) rescales its weights in eval mode."""
    return any(hasattr(module, "layers_are_rescaled") for module in model.modules())


def undo_rescaling(model: nn.Module) -> None:
    """Give weights that a model of transformers rescales in eval mode (RWKV-4) the scale they train at.

    Such a model rescales them again by itself, in its next forward pass in eval mode.
    """
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            is_training, module.training = module.training, True
            module._rescale_layers()  # type: ignore[operator]
            module.training = is_training
