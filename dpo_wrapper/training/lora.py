"""Load the model that a run trains, with the adapter that its options ask for."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_wrapper.pretrained import (
    ADAPTER_CONFIG,
    PRESETS,
    AdapterOrigin,
    PretrainedModel,
    absolute_name,
    find_base,
    import_peft,
    is_adapter_folder,
    load_adapter,
    load_converted_adapter,
    load_pretrained,
    merge_adapter,
    own_tokenizer,
    remember_initial_factors,
)
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.options.lora import parse_layers

MODELS_WITH_KERNELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Types of transformers' models whose kernels read the weight of `out_proj` without calling the layer."""

IN_A_BLOCK = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
"""The name of a module in a block, whose number is the first in it, as PEFT counts them."""


def name_adapter(config: TrainConfig) -> TrainConfig:
    """The settings with `adapter` and `model` filled in where one of them names the other.

    `--model` with the folder of an adapter continues that adapter, and an adapter names its base.

    Raises:
        ValueError: there is no adapter in the folder, or nothing that --load-in-4bit would train.
    """
    if not config.lora and config.adapter is None and is_adapter_folder(config.model):
        config = replace(config, adapter=Path(config.model), model=find_base(config.model))
    if config.adapter is not None and not is_adapter_folder(config.adapter):
        raise ValueError(
            f"--adapter should be the folder of an adapter, but {config.adapter} holds no {ADAPTER_CONFIG}: "
            "name the folder that PEFT or a run with --lora wrote."
        )
    if config.adapter is not None and config.model in PRESETS:
        config = replace(config, model=find_base(config.adapter))
    if config.load_in_4bit and not config.lora and config.adapter is None:
        raise ValueError(
            "--load-in-4bit should be given with an adapter, for weights in 4 bits do not train, but there "
            "is none: add --lora, or leave it out."
        )
    return config


def load_policy(
    config: TrainConfig, stage_folder: str | None, tokenizer_options: Mapping[str, Any], **options: Any
) -> PretrainedModel:
    """The model that a run trains, with its adapter if it has one.

    Args:
        config: as `name_adapter` returns it.
        stage_folder: the model after a stage of a run that is resumed; None at the beginning of a run.
        tokenizer_options, options: as in `load_pretrained`.

    Raises:
        ValueError: the model cannot be loaded, or an option of LoRA does not fit it.
        ImportError: peft is missing.
    """

    def load(name: str, tokenizer_name: str | None) -> PretrainedModel:
        return load_pretrained(name, tokenizer_name, config.max_length, tokenizer_options, **options)

    if not config.lora and config.adapter is None:
        return load(stage_folder or config.model, config.tokenizer)
    import_peft()
    if config.load_in_4bit:
        options["quantization_config"] = quantize_to_4bit(config)
    if config.adapter is not None:
        base = load(config.model, config.tokenizer or own_tokenizer(config.adapter))
        adapted = load_adapter(stage_folder or config.adapter, base, config.model)
        assert adapted.adapter is not None
        return replace(adapted, adapter=replace(adapted.adapter, folder=absolute_name(str(config.adapter))))
    base = merge_adapter(load(config.model, config.tokenizer))
    base = replace(base, adapter=base.adapter or AdapterOrigin(absolute_name(config.model)))
    lora_config = make_lora_config(base, config)
    if stage_folder is None:
        adapted = replace(base, model=import_peft().get_peft_model(base.model, lora_config))
        return remember_initial_factors(adapted) if config.changes_base_weights else adapted
    if config.changes_base_weights:
        return load_converted_adapter(stage_folder, base, lora_config)
    adapted = load_adapter(stage_folder, base, config.model)
    return replace(adapted, adapter=base.adapter)


def quantize_to_4bit(config: TrainConfig) -> Any:
    """How transformers loads a base in 4 bits; an error in one sentence where it cannot be computed."""
    if config.cpu or not torch.cuda.is_available():
        why = "--cpu is given" if config.cpu else "there is none"
        raise ValueError(
            f"--load-in-4bit should be given on a machine with a CUDA device, but {why}: leave it out."
        )
    if find_spec("bitsandbytes") is None:
        raise ImportError("--load-in-4bit needs bitsandbytes, which is missing: pip install bitsandbytes.")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if config.precision == "no" else torch.bfloat16,
    )


def make_lora_config(base: PretrainedModel, config: TrainConfig) -> Any:
    """PEFT's configuration of a new adapter; ValueError if an option does not fit the model."""
    candidates = find_layers(base.model)
    return import_peft().LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha or (8 if config.use_rslora else 2 * config.lora_r),
        lora_dropout=config.lora_dropout,
        target_modules=choose_targets(base.model, candidates, config.lora_targets),
        layers_to_transform=choose_layers(candidates, config.lora_layers),
        init_lora_weights=True if config.lora_init == "default" else config.lora_init,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in candidates.values()),
        task_type=None if base.decoder_args is not None else "CAUSAL_LM",
    )


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that LoRA can adapt, by name."""
    kinds = (nn.Linear, nn.Embedding)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    }


def choose_targets(
    model: nn.Module, candidates: Mapping[str, nn.Module], wanted: tuple[str, ...] | None
) -> list[str] | str:
    """The target modules as PEFT takes them; ValueError if a name matches no layer."""
    if wanted is None:
        return shorten_names(find_block_layers(model, candidates), model)
    if len(wanted) == 1 and re.search(r"[\\*+?|()\[\]^$]", wanted[0]):
        matched = {name for name in candidates if re.fullmatch(wanted[0], name)}
        check_targets(model, candidates, wanted[0], matched)
        return wanted[0]
    for target in wanted:
        matched = {name for name in candidates if f".{name}".endswith(f".{target}")}
        check_targets(model, candidates, target, matched)
    return list(wanted)


def find_block_layers(model: Any, candidates: Mapping[str, nn.Module]) -> list[str]:
    """The names of the linear layers in the blocks of the part of a model that reads text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in (decoder or model).modules()}
    has_kernels = getattr(getattr(model, "config", None), "model_type", None) in MODELS_WITH_KERNELS
    names = [
        name
        for name, module in candidates.items()
        if id(module) in inside and IN_A_BLOCK.match(name) and not isinstance(module, nn.Embedding)
        if not (has_kernels and name.endswith("out_proj"))
    ]
    if not names:
        raise ValueError(
            f"--lora should find linear layers in numbered blocks, but {type(model).__name__} has none: name "
            f"layers by --lora-targets; it has {', '.join(name_kinds(candidates)) or 'none'}."
        )
    return names


def shorten_names(names: Iterable[str], model: nn.Module) -> list[str]:
    """The shortest ends of the names, in dotted parts, that no other module of the model ends with."""
    chosen = set(names)
    others = [f".{name}" for name, _ in model.named_modules() if name not in chosen]
    ends = set()
    for name in chosen:
        parts = name.split(".")
        possible = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        ends.add(next(end for end in possible if not any(o.endswith(f".{end}") for o in others)))
    return sorted(ends)


def check_targets(
    model: Any, candidates: Mapping[str, nn.Module], target: str, matched: Iterable[str]
) -> None:
    names = list(matched)
    if not names:
        raise ValueError(
            f"--lora-targets should name layers of the model, but {target} matches none: it has "
            f"{', '.join(name_kinds(candidates))}."
        )
    weights = [id(module.weight) for module in candidates.values()]
    for name in names:
        if weights.count(id(candidates[name].weight)) > 1:
            raise ValueError(
                f"--lora-targets should name layers with weights of their own, but {name} shares its weight "
                "(tied embeddings), which an adapter would part: leave it out."
            )


def name_kinds(candidates: Iterable[str]) -> list[str]:
    """The names of layers without the numbers of their blocks."""
    kinds = [re.sub(r"^.*?\.\d+\.", "", name) if IN_A_BLOCK.match(name) else name for name in candidates]
    return list(dict.fromkeys(kinds))


def choose_layers(candidates: Iterable[str], wanted: str | None) -> list[int] | None:
    """The numbers of the blocks to adapt, None for all; ValueError if the model has one of them not."""
    layers = None if wanted is None else parse_layers(wanted)
    if layers is None:
        return None
    present = sorted({int(found["index"]) for name in candidates if (found := IN_A_BLOCK.match(name))})
    if missing := [number for number in layers if number not in present]:
        last = f"has blocks {present[0]} to {present[-1]}" if present else "has no numbered blocks"
        raise ValueError(
            f"--lora-layers should be numbers of the model's blocks, but {missing[0]} is none of them: the "
            f"model {last}."
        )
    return layers
