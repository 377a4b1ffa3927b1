"""LoRA adapters in GGUF files, as llama.cpp applies them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpo_wrapper.pretrained.gguf_names import EMBEDDING, find_module, restore_rows

GGUF_ADAPTER = "adapter.gguf"
"""In a folder with PEFT's adapter_config.json, in place of PEFT's weights."""


@dataclass(frozen=True)
class GgufAdapter:
    """A LoRA adapter, its factors by the paths of transformers' modules, as PEFT has them.

    Attributes:
        architecture: as llama.cpp calls it.
        alpha: 0 where the file has none.
        factors: Float[r, in] and Float[out, r]; of embeddings Float[r, tokens] and Float[width, r].
        types: how the file stores tensors, by gguf's names.
    """

    architecture: str
    alpha: float
    factors: dict[str, tuple[Tensor, Tensor]]
    types: frozenset[str]

    def scale(self, path: str) -> float:
        """What the product of two factors is multiplied by: 1 where alpha is 0, as llama.cpp has it."""
        return self.alpha / len(self.factors[path][0]) if self.alpha else 1.0


def import_gguf() -> Any:
    """The library; ImportError with what to install if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF files should be read and written by gguf, but it is missing: pip install gguf."
        ) from error
    return gguf


def open_gguf(file: Path) -> Any:
    """A file, opened by `gguf.GGUFReader`.

    Raises:
        ValueError: it is no GGUF file, or not a whole one.
    """
    try:
        return import_gguf().GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{file} should be a GGUF file, but it cannot be read ({error}).") from error


def read_field(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def read_tensor(tensor: Any) -> Tensor:
    """A tensor of a file in float32."""
    return torch.from_numpy(import_gguf().quants.dequantize(tensor.data, tensor.tensor_type).copy())


def read_gguf_adapter(file: Path, config: Any) -> GgufAdapter:
    """The adapter in a file.

    Args:
        file: written for llama.cpp.
        config: that of transformers' model which the adapter is for.

    Raises:
        ValueError: the file holds something else.
    """
    reader = open_gguf(file)
    architecture = read_field(reader, "general.architecture", "")
    kind = read_field(reader, "general.type"), read_field(reader, "adapter.type")
    if kind != ("adapter", "lora"):
        raise ValueError(f"{file} should hold a LoRA adapter, but its types are {kind[0]} and {kind[1]}.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = {}
    for name in [name.removesuffix(".weight.lora_a") for name in tensors if name.endswith(".lora_a")]:
        path = find_module(name, architecture)
        if path is None or f"{name}.weight.lora_b" not in tensors:
            raise ValueError(
                f"{file} should hold two factors for weights of a model, but for {name} it does not."
            )
        a, b = (read_tensor(tensors[f"{name}.weight.lora_{letter}"]) for letter in "ab")
        b = restore_rows(b, path, architecture, config.num_attention_heads, config.num_key_value_heads)
        factors[path] = (a.T.contiguous() if path == EMBEDDING else a, b)
    alpha = float(read_field(reader, "adapter.lora.alpha", 0.0))
    return GgufAdapter(architecture, alpha, factors, frozenset(t.tensor_type.name for t in reader.tensors))


def is_gguf_folder(folder: str | Path) -> bool:
    """Whether the factors of an adapter are in a GGUF file."""
    return (Path(folder) / GGUF_ADAPTER).is_file()


def load_gguf_adapter(folder: str | Path, base: nn.Module) -> nn.Module:
    """PEFT's model of a base with the adapter in a folder, which trains.

    Raises:
        ValueError: the file is none of an adapter, or has not the factors that adapter_config.json says.
    """
    import peft

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode, config.init_lora_weights = False, True  # others may change the base
    file = Path(folder) / GGUF_ADAPTER
    adapter = read_gguf_adapter(file, base.config)
    model: Any = peft.get_peft_model(base, config)
    state: dict[str, Tensor] = {}
    for path, (a, b) in adapter.factors.items():
        scale = getattr(model.get_base_model().get_submodule(path), "scaling", {}).get("default")
        b = b * (adapter.scale(path) / scale) if scale else b
        form = "lora_embedding_{}" if path == EMBEDDING else "lora_{}.weight"
        prefix = f"base_model.model.{path}.{form}"
        state |= {prefix.format("A"): a, prefix.format("B"): b}
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in own.items()}:
        raise ValueError(
            f"{file} should hold the factors that {folder}/adapter_config.json says, but it holds others: "
            "export the adapter again."
        )
    peft.set_peft_model_state_dict(model, state)
    return cast(nn.Module, model)
