"""The GGUF file of a base, on which an adapter is tried."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.pretrained.gguf_adapter import open_gguf, read_field, read_tensor
from dpo_wrapper.pretrained.gguf_names import ARCHITECTURES, find_module, restore_rows


def check_base_file(file: Path, model: Any, base: str) -> None:
    """Raise ValueError unless a file has the weights of a base, whatever their values.

    Args:
        file: for `--base`.
        model: transformers' model of the base.
        base: its folder or name.
    """
    if not file.is_file():
        raise ValueError(f"--base should be the GGUF file of {base}, but {file} is not there: name another.")
    reader, config = open_gguf(file), model.config
    architecture = read_field(reader, "general.architecture")
    vocabulary = [t.shape[1] for t in reader.tensors if t.name == "token_embd.weight"]
    facts = {
        "the type": (read_field(reader, "general.type", "model"), "model"),
        "the number of files it is split into": (read_field(reader, "split.count", 1) or 1, 1),
        "the architecture": (architecture, ARCHITECTURES[config.model_type]),
        "the number of layers": (read_field(reader, f"{architecture}.block_count"), config.num_hidden_layers),
        "the width": (read_field(reader, f"{architecture}.embedding_length"), config.hidden_size),
        "the width of the feed-forward layers": (
            read_field(reader, f"{architecture}.feed_forward_length"),
            config.intermediate_size,
        ),
        "the number of heads": (
            read_field(reader, f"{architecture}.attention.head_count"),
            config.num_attention_heads,
        ),
        "the size of the vocabulary": (
            vocabulary[0] if vocabulary else None,
            len(model.get_input_embeddings().weight),
        ),
    }
    for words, (found, expected) in facts.items():
        if found != expected:
            raise ValueError(
                f"--base should be the GGUF file of {base}, but {words} in {file} is {found} and not "
                f"{expected}: name another."
            )


@torch.no_grad()
def load_base_file(model: Any, file: Path) -> None:
    """Give a model of transformers, with PEFT's layers in it, the weights of a file in float32.

    Args:
        model: of the base that `check_base_file` has compared the file with.
        file: for `--base`.

    Raises:
        ValueError: the file has weights that the model has not, or the other way round.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    heads = config.num_attention_heads, config.num_key_value_heads
    modules = {
        path: getattr(module, "base_layer", module)
        for path, module in model.named_modules()
        if ".base_layer" not in path and ".lora_" not in path
    }
    missing = {
        f"{path}.{kind}" for path in modules for kind, _ in modules[path].named_parameters(recurse=False)
    }
    for tensor in open_gguf(file).tensors:
        name, _, kind = tensor.name.rpartition(".")
        if name.startswith(("rope_freqs", "rope_factors")):  # computed from the configuration
            continue
        path = find_module(name, architecture)
        values = restore_rows(read_base_tensor(tensor, file), str(path), architecture, *heads)
        weight = getattr(modules.get(str(path)), kind, None)
        if weight is None or weight.shape != values.shape:
            raise ValueError(
                f"--base should have the weights of a {config.model_type} model as transformers has it, but "
                f"{tensor.name} in {file} is none of them: name another."
            )
        if architecture.startswith("gemma") and name.endswith("norm"):
            values -= 1  # transformers adds it
        if name == "output" and config.tie_word_embeddings:
            setattr(modules["lm_head"], kind, nn.Parameter(values, requires_grad=False))
        else:
            weight.data = values
        missing.discard(f"{path}.{kind}")
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    if missing:
        raise ValueError(
            f"--base should have the weights of a {config.model_type} model as transformers has it, but "
            f"{file} has none for {min(missing)}: name another."
        )


def read_base_tensor(tensor: Any, file: Path) -> Tensor:
    try:
        return read_tensor(tensor)
    except NotImplementedError as error:
        raise ValueError(
            f"--base should hold weights that the library gguf can read, but {tensor.name} in {file} is "
            f"{tensor.tensor_type.name}: name a file that is quantized otherwise."
        ) from error
