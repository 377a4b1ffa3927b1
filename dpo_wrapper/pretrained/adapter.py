"""Load and save adapters in PEFT's format: an adapter beside the name of the base that it stands on."""

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpo_wrapper.data.tokens.tokenizers import has_tokenizer
from dpo_wrapper.pretrained.converted_adapter import (
    as_plain_lora,
    split_plain_lora,
    take_out_of_base,
)
from dpo_wrapper.pretrained.gguf_adapter import is_gguf_folder, load_gguf_adapter
from dpo_wrapper.pretrained.mlx_adapter import is_mlx_folder, load_mlx_adapter
from dpo_wrapper.pretrained.model import PretrainedModel, check_finished

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterOrigin:
    """What an adapter stands on, and where it comes from.

    Attributes:
        base: folder or name of the model that has no adapter.
        merged: folders of the adapters that are merged into it in memory, in this order.
        folder: where the adapter was loaded from; None if it is new.
        initial: LoRA factors, by PEFT's names, whose product was taken out of the base's weights (PiSSA and
            the like); None where the base is as it was loaded.
    """

    base: str
    merged: tuple[str, ...] = ()
    folder: str | None = None
    initial: Mapping[str, Tensor] | None = None

    @property
    def parent(self) -> str:
        """The name that PEFT notes as the base: of the adapter that was merged last, or else of the base."""
        return self.merged[-1] if self.merged else self.base

    @property
    def base_in_words(self) -> str:
        """The base with what is merged into it."""
        merged = "".join(f", {folder} merged into it" for folder in self.merged)
        return f"the base model ({self.base}{merged})"


def import_peft() -> Any:
    """The library; ImportError with what to install if it is missing."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "adapters should be made and loaded by peft, but it is missing: pip install peft."
        ) from error
    return peft


def make_peft_model(model: nn.Module, lora_config: Any) -> nn.Module:
    """The model with a new adapter, which alone trains."""
    with without_deprecations():
        return import_peft().get_peft_model(model, lora_config)


@contextmanager
def without_deprecations() -> Iterator[None]:
    """Say nothing of what PEFT calls in transformers and should not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def is_adapter_folder(name: str | Path) -> bool:
    return (Path(name) / ADAPTER_CONFIG).is_file()


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8"))


def find_base(folder: str | Path) -> str:
    """Folder or name of the base that the adapter in a folder names.

    Raises:
        ValueError: the folder holds no finished adapter, or it names no base, or a folder that is not there.
    """
    check_finished(Path(folder))
    settings = read_adapter_config(folder)
    base = settings.get("model" if is_mlx_folder(folder) else "base_model_name_or_path")
    if not base:
        raise ValueError(
            f"the adapter in {folder} should name its base, but it names none: give --model BASE "
            f"--adapter {folder}."
        )
    if Path(base).is_absolute() and not Path(base).exists():
        raise ValueError(
            f"the base of the adapter in {folder} should be in {base}, but there is nothing: put it "
            f"back, or to train on another give --model BASE --adapter {folder}."
        )
    return str(base)


def own_tokenizer(folder: str | Path) -> str | None:
    """The folder of an adapter if it holds a tokenizer, else None."""
    return str(folder) if has_tokenizer(folder) else None


def absolute_name(name: str) -> str:
    """A folder by its absolute path; a name on the hub as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def load_adapter(folder: str | Path, base: PretrainedModel, base_name: str) -> PretrainedModel:
    """The base with the adapter in a folder, which trains; the base's own weights do not.

    It is in PEFT's form, in mlx-lm's, or in a GGUF file beside PEFT's configuration.
    An adapter that the base has is merged into it first.
    """
    check_finished(Path(folder))
    base = merge_adapter(base)
    origin = base.adapter or AdapterOrigin(absolute_name(base_name))
    peft = import_peft()
    with without_deprecations():
        if is_mlx_folder(folder):
            model = load_mlx_adapter(folder, read_adapter_config(folder), base.model)
        elif is_gguf_folder(folder):
            model = load_gguf_adapter(folder, base.model)
        else:
            model = peft.PeftModel.from_pretrained(base.model, str(folder), is_trainable=True)
    return replace(base, model=model, adapter=replace(origin, folder=str(Path(folder).absolute())))


def store_initial_factors(pretrained: PretrainedModel) -> PretrainedModel:
    """A model whose adapter was just made from a part of the base's weights, with a copy of its factors."""
    assert pretrained.adapter is not None
    state = import_peft().get_peft_model_state_dict(pretrained.model, save_embedding_layers=False)
    initial = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    return replace(pretrained, adapter=replace(pretrained.adapter, initial=initial))


def load_converted_adapter(folder: str | Path, base: PretrainedModel, lora_config: Any) -> PretrainedModel:
    """What `save_adapter` has converted, as it was in training: its own rank, on what is left of the base.

    `lora_config` is PEFT's configuration that the adapter was made with.
    """
    from safetensors.torch import load_file

    peft = import_peft()
    assert base.adapter is not None
    trained, initial = split_plain_lora(load_file(Path(folder) / ADAPTER_WEIGHTS))
    lora_config = deepcopy(lora_config)
    lora_config.init_lora_weights = True
    model = make_peft_model(base.model, lora_config)
    take_out_of_base(model, initial)
    peft.set_peft_model_state_dict(model, trained)
    return replace(base, model=model, adapter=replace(base.adapter, initial=initial))


def merge_adapter(pretrained: PretrainedModel) -> PretrainedModel:
    """The model with its adapter, if it has one, written into the weights; `adapter.merged` names it then."""
    origin, model = pretrained.adapter, pretrained.model
    if origin is None or origin.folder is None or not hasattr(model, "merge_and_unload"):
        return pretrained
    untie_adapted_layers(model)
    merged = replace(origin, merged=(*origin.merged, origin.folder), folder=None)
    whole: Any = model.merge_and_unload()  # type: ignore[operator]
    note_untied_head(whole)
    return replace(pretrained, model=whole, adapter=merged)


def untie_adapted_layers(model: nn.Module) -> None:
    """Give layers with an adapter weights of their own, where others share them: merging writes into them."""
    sharers = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        adapted: Any = module
        layer = adapted.get_base_layer() if hasattr(adapted, "get_base_layer") else None
        weight = getattr(layer, "weight", None)
        if layer is not None and weight is not None and sharers[id(weight)] > 1:
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def note_untied_head(model: Any) -> None:
    """Write into the configuration that embeddings and head are parted, or loading would tie them again."""
    config = getattr(model, "config", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if config is None or head is None or head.weight is model.get_input_embeddings().weight:
        return
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def save_adapter(model: nn.Module, origin: AdapterOrigin, folder: Path) -> None:
    """Write the adapter of a model as PEFT reads it, for the base as `origin` names it."""
    from safetensors.torch import save_file

    peft = import_peft()
    peft_model: Any = model
    state = peft.get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    config = peft_model.peft_config[peft_model.active_adapter]
    if origin.initial is not None:
        state, config = as_plain_lora(state, origin.initial, config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, str(folder / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    save_adapter_config(config, origin, folder)


def save_adapter_config(config: Any, origin: AdapterOrigin, folder: Path) -> None:
    """Write PEFT's configuration of an adapter, for the base as `origin` names it."""
    config = deepcopy(config)
    config.base_model_name_or_path, config.inference_mode = origin.parent, True
    config.save_pretrained(str(folder))
