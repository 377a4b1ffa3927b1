"""The GGUF file of a base, on which an adapter is tried."""

from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from dpo_wrapper.commands.export.gguf.families import Family, architecture_id
from dpo_wrapper.commands.export.gguf.tensors import has_tied_head
from dpo_wrapper.pretrained.adapter import import_peft, make_peft_model
from dpo_wrapper.pretrained.gguf_adapter import import_gguf, open_gguf, read_field
from dpo_wrapper.pretrained.gguf_file import load_gguf


def check_base_file(file: Path, base: nn.Module, family: Family, name: str) -> None:
    """Raise ValueError unless a file has the weights of a base, whatever their values.

    Args:
        file: for `--base`.
        base: transformers' model, with or without PEFT's layers in it.
        family: of the model.
        name: folder or name of the base.
    """
    if not file.is_file():
        raise ValueError(f"--base should be the GGUF file of {name}, but {file} is not there: name another.")
    reader = open_gguf(file)
    config: Any = base.config
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    facts = {
        "the type": (read_field(reader, "general.type", "model"), "model"),
        "the number of files that it is split into": (read_field(reader, "split.count") or 1, 1),
        "the architecture": (read_field(reader, "general.architecture"), family.architecture),
    }
    for words, key, expected in (
        ("layers", "block_count", config.num_hidden_layers),
        ("heads", "attention.head_count", config.num_attention_heads),
    ):
        facts[f"the number of {words}"] = (read_field(reader, f"{family.architecture}.{key}"), expected)
    for tensor_name, shape in list_shapes(base, family):
        facts[f"the shape of {tensor_name}"] = shapes.get(tensor_name), shape
    if "output.weight" not in shapes and has_tied_head(base):
        facts.pop("the shape of output.weight", None)
    for words, (found, expected) in facts.items():
        if found != expected:
            raise ValueError(
                f"--base should be the GGUF file of {name}, but {words} in {file} is {found} and not "
                f"{expected}: name another."
            )


def list_shapes(base: nn.Module, family: Family) -> list[tuple[str, tuple[int, ...]]]:
    """The weights of a base by llama.cpp's names, and their shapes."""
    config: Any = base.config
    names = import_gguf().get_tensor_name_map(architecture_id(family), config.num_hidden_layers)
    weights = {
        key.replace(".base_layer", ""): w for key, w in base.state_dict().items() if ".lora_" not in key
    }
    named = {names.get_name(key, try_suffixes=(".weight", ".bias")): w for key, w in weights.items()}
    return [(name, tuple(weight.shape)) for name, weight in named.items() if name is not None]


def has_head(base: nn.Module, file: Path | None) -> bool:
    """Whether the file of a base, or the one that would be written, has a head beside the embeddings."""
    if file is None:
        return not has_tied_head(base)
    return any(tensor.name == "output.weight" for tensor in open_gguf(file).tensors)


def is_float32(file: Path) -> bool:
    """Whether all weights of a file are in float32, so that llama.cpp rounds nothing beside them."""
    return all(tensor.tensor_type.name == "F32" for tensor in open_gguf(file).tensors)


def load_base_file(file: Path, config: Any) -> nn.Module:
    """The model in a file that `check_base_file` has seen, in float32, as `config` says in all else."""
    config = deepcopy(config)
    config.tie_word_embeddings = all(tensor.name != "output.weight" for tensor in open_gguf(file).tensors)
    with TemporaryDirectory() as folder:  # beside an adapter_config.json transformers would load that
        link = Path(folder) / file.name
        link.symlink_to(file.resolve())
        model: nn.Module = load_gguf(link, config, torch.float32)
    return model.eval()


def copy_adapter(model: Any, base: nn.Module) -> nn.Module:
    """PEFT's model of another base, with the adapter of a model."""
    peft = import_peft()
    config = deepcopy(model.peft_config[model.active_adapter])
    config.init_lora_weights = True  # other beginnings would change the base
    copy = make_peft_model(base, config)
    peft.set_peft_model_state_dict(copy, peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    return copy.eval()
