"""Load the model that a run trains, with the adapter that its options ask for."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from dpo_wrapper.pretrained import PRESETS, AdapterOrigin, PretrainedModel, load_pretrained
from dpo_wrapper.pretrained.adapter import (
    ADAPTER_CONFIG,
    absolute_name,
    find_base,
    import_peft,
    is_adapter_folder,
    load_adapter,
    load_converted_adapter,
    make_peft_model,
    merge_adapter,
    own_tokenizer,
    store_initial_factors,
)
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.lora_targets import choose_layers, choose_targets, find_layers


def name_adapter(config: TrainConfig) -> TrainConfig:
    """The settings with `adapter` and `model` filled in where one of them names the other.

    `--model` with the folder of an adapter continues that adapter, and an adapter names its base.

    Raises:
        ValueError: there is no adapter in the folder, a new adapter would adapt a new model, or a base in 4
            bits would have none.
    """
    if config.lora and config.is_new_model:
        raise ValueError(
            f"--lora should adapt a trained model, but --model {config.model} is a new one: train it first, "
            "and give its run folder as --model."
        )
    if not config.lora and config.adapter is None and is_adapter_folder(config.model):
        config = replace(config, adapter=Path(config.model), model=find_base(config.model))
    if config.adapter is not None and not is_adapter_folder(config.adapter):
        raise ValueError(
            f"--adapter should be the folder of an adapter, but {config.adapter} holds no {ADAPTER_CONFIG}: "
            "name the folder that PEFT or a run with --lora wrote."
        )
    if config.adapter is not None and config.model in PRESETS:
        config = replace(config, model=find_base(config.adapter))
    if config.load_in_4bit and config.lora and is_adapter_folder(config.model):
        raise ValueError(
            f"--load-in-4bit should be given with a model without an adapter, but {config.model} holds one, "
            "and weights in 4 bits cannot take it in: merge it, save the result, and give that as --model."
        )
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
        adapted = replace(base, model=make_peft_model(base.model, lora_config))
        return store_initial_factors(adapted) if config.changes_base_weights else adapted
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

    PartialState()  # from now on each process loads to its own device
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if config.precision == "no" else torch.bfloat16,
    )


def make_lora_config(base: PretrainedModel, config: TrainConfig) -> Any:
    """PEFT's configuration of a new adapter; ValueError if an option does not fit the model."""
    candidates = find_layers(base.model)
    layers = choose_layers(candidates, config.lora_layers)
    is_transposed = any(type(module).__name__ == "Conv1D" for module in candidates.values())
    if is_transposed and config.lora_init == "olora":
        raise ValueError(
            "--lora-init olora should be given for a model with plain linear layers, but those of "
            f"{type(base.model).__name__} are stored transposed, which it does not know: choose pissa."
        )
    return import_peft().LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha or (8 if config.use_rslora else 2 * config.lora_r),
        lora_dropout=config.lora_dropout,
        target_modules=choose_targets(base.model, candidates, config.lora_targets, layers),
        layers_to_transform=layers,
        init_lora_weights=True if config.lora_init == "default" else config.lora_init,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        fan_in_fan_out=is_transposed,
        task_type=None if base.decoder_args is not None else "CAUSAL_LM",
    )
