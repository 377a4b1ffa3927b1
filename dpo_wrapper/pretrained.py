"""Models by name or folder, and folders that this project, x-transformers and transformers can load again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_wrapper.data.tokenizers import Tokenizer, load_tokenizer
from dpo_wrapper.training.config import PRESETS

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Policy:
    """A language model with its tokenizer. `decoder` holds the arguments of x-transformers' classes."""

    model: nn.Module
    tokenizer: Tokenizer
    tokenizer_name: str
    decoder: dict[str, Any] | None


def build_decoder(decoder: dict[str, Any]) -> nn.Module:
    """`TransformerWrapper(**decoder, attn_layers = Decoder(**decoder['attn_layers']))`."""
    from x_transformers import Decoder, TransformerWrapper

    return TransformerWrapper(**{**decoder, "attn_layers": Decoder(**decoder["attn_layers"])})


def preset(name: str, vocab_size: int, max_length: int) -> dict[str, Any]:
    """Arguments of a small decoder: rotary positions, flash attention, RMSNorm and SwiGLU."""
    layers = {
        **PRESETS[name],
        "attn_dim_head": PRESETS[name]["dim"] // PRESETS[name]["heads"],
        "rotary_pos_emb": True,
        "attn_flash": True,
        "use_rmsnorm": True,
        "ff_swish": True,
        "ff_glu": True,
        "ff_no_bias": True,
    }
    return {
        "num_tokens": vocab_size,
        "max_seq_len": max_length,
        "use_abs_pos_emb": False,
        "attn_layers": layers,
    }


def load_policy(name: str, tokenizer_name: str | None, max_length: int) -> Policy:
    """A preset, a folder written by `save_policy`, or a Hugging Face model by folder or name, in float32.

    Raises:
        ValueError: a folder without a model, a name that cannot be fetched, a tokenizer with other ids than
            the model.
    """
    if name in PRESETS:
        tokenizer_name = tokenizer_name or "bytes"
        tokenizer = load_tokenizer(tokenizer_name)
        decoder = preset(name, tokenizer.vocab_size, max_length)
        return Policy(build_decoder(decoder), tokenizer, tokenizer_name, decoder)

    config = Path(name) / CONFIG
    if Path(name).is_dir() and not config.is_file():
        raise ValueError(f"{name} holds no {CONFIG}: expected a run folder or a Hugging Face model folder.")
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if "x_transformers" in settings:
        from safetensors.torch import load_model

        decoder = settings["x_transformers"]
        tokenizer_name = tokenizer_name or settings["tokenizer"]
        if tokenizer_name != "bytes" and tokenizer_name == settings["tokenizer"]:
            tokenizer_name = name
        model = build_decoder(decoder)
        load_model(model, Path(name) / WEIGHTS)
        return checked(Policy(model, load_tokenizer(tokenizer_name), tokenizer_name, decoder))

    if set(settings) == {"dpo_wrapper"}:
        raise ValueError(f"the run in {name} has not finished: resume it, or use the model in {name}/sft.")

    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model {name}: expected {', '.join(PRESETS)}, a run folder or a Hugging Face causal LM by "
            f"folder or name, but it could not be loaded: {first}"
        ) from error
    tokenizer_name = tokenizer_name or name
    return checked(Policy(model, load_tokenizer(tokenizer_name), tokenizer_name, None))


def checked(policy: Policy) -> Policy:
    decoder = policy.decoder
    size = decoder["num_tokens"] if decoder else policy.model.get_input_embeddings().num_embeddings  # type: ignore
    if policy.tokenizer.vocab_size > size:
        raise ValueError(
            f"the tokenizer {policy.tokenizer_name} has {policy.tokenizer.vocab_size} ids but the "
            f"model "
            f"only {size}: use the model's own tokenizer."
        )
    return policy


def save_policy(policy: Policy, model: nn.Module, folder: Path, training: dict[str, Any]) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer, so that `load_policy(folder)` gives the
    model back.

    A decoder's weights go by the names that x-transformers has for them; its arguments stand in config.json
    under "x_transformers". A Hugging Face model is saved by its own `save_pretrained`. How the model was
    trained stands under "dpo_wrapper" in either.
    """
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    if policy.decoder is not None:
        save_model(model, str(folder / WEIGHTS))
        settings: dict[str, Any] = {
            "x_transformers": policy.decoder,
            "tokenizer": "bytes" if policy.tokenizer_name == "bytes" else ".",
        }
    else:
        model.save_pretrained(folder)  # type: ignore[operator]
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    policy.tokenizer.save(folder)
    settings["dpo_wrapper"] = training
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
