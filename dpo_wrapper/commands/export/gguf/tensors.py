"""The weights of a model under llama.cpp's names, in its order of rows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_wrapper.commands.export.gguf.families import REMEDY, Family, architecture_id

Array = NDArray[np.float32]


def convert_tensors(model: Any, family: Family) -> Iterator[tuple[str, Array]]:
    """Each tensor of a GGUF file by its name, in float32.

    Raises:
        ValueError: llama.cpp has no name for a tensor, or ties a head that is not tied.
    """
    from gguf import get_tensor_name_map

    config = model.config
    names = get_tensor_name_map(architecture_id(family), config.num_hidden_layers)
    is_tied = has_tied_head(model)
    if not is_tied and family.architecture in ("gemma", "gemma2"):
        raise ValueError(
            f"the head of a {type(model).__name__} should be its embedding for llama.cpp, but it is another "
            f"tensor: {REMEDY}."
        )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and is_tied:
            continue
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise ValueError(
                f"each tensor of the model should have a name in llama.cpp, but {name} has none: {REMEDY}."
            )
        yield new_name, as_array(convert_tensor(name, tensor, config, family))
    yield from compute_rope_factors(model, family)


def has_tied_head(model: Any) -> bool:
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding)


def convert_tensor(name: str, tensor: Tensor, config: Any, family: Family) -> Tensor:
    """A tensor as llama.cpp's kernels take it."""
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + family.norm_offset
    part = name.split(".")[-2]
    if family.interleaves_rope and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        return interleave_halves(tensor, heads)
    return tensor


def interleave_halves(tensor: Tensor, heads: int) -> Tensor:
    """Let the rows of the two halves of each head alternate: 0, n/2, 1, n/2 + 1, ..."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def compute_rope_factors(model: Any, family: Family) -> Iterator[tuple[str, Array]]:
    """What llama.cpp divides the frequencies of rotary positions by, where it is more than one number."""
    from gguf import MODEL_TENSOR, TENSOR_NAMES

    config = model.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        frequencies = model.model.rotary_emb.inv_freq.double()
        exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
        factors = rope["rope_theta"] ** -exponents / frequencies
        yield TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS] + ".weight", as_array(factors)
    elif kind == "longrope":
        for tensor, key in (
            (MODEL_TENSOR.ROPE_FACTORS_LONG, "long_factor"),
            (MODEL_TENSOR.ROPE_FACTORS_SHORT, "short_factor"),
        ):
            yield TENSOR_NAMES[tensor] + ".weight", np.array(rope[key], dtype=np.float32)


def as_array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().float().contiguous().numpy()
