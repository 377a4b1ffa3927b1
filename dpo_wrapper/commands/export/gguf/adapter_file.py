"""The file of a LoRA adapter for llama.cpp."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from dpo_wrapper.commands.export.lora_factors import LoraFactors
from dpo_wrapper.pretrained.gguf_adapter import import_gguf
from dpo_wrapper.pretrained.gguf_names import ARCHITECTURES


def write_adapter_file(factors: Sequence[LoraFactors], file: Path, config: Any, base: str) -> None:
    """Write the factors in float32, as llama.cpp applies them: x -> W x + alpha / r · B A x.

    The file has one alpha. Factors of another scale have theirs in B.

    Args:
        factors: of the adapter.
        file: is new.
        config: that of transformers' model which the adapter stands on.
        base: folder or name of that model.

    Raises:
        ValueError: llama.cpp has no place for a factor.
    """
    names = name_tensors(factors, config)
    gguf = import_gguf()
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config.model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = max(abs(one.scale) * one.rank for one in factors) or 1.0  # 0 would be read as a scale of 1
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(base).name)
    if not Path(base).exists():
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for one, name in zip(factors, names, strict=True):
        a = one.a.T if one.is_embedding else one.a
        b = order_rows(one.b, one.path, config) * (one.scale * one.rank / alpha)
        writer.add_tensor(f"{name}.weight.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def name_tensors(factors: Sequence[LoraFactors], config: Any) -> list[str]:
    """What llama.cpp calls the weights that factors change; ValueError where it cannot change them."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"--adapter should be given for a model of {', '.join(ARCHITECTURES)}, whose GGUF files are "
            f"known here, but this one is of {config.model_type}: use --to gguf without it."
        )
    if not factors:
        raise ValueError("--adapter should be given for an adapter with factors, but this one has none.")
    gguf = import_gguf()
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = architectures[ARCHITECTURES[config.model_type]]
    name_map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    names = []
    for one in factors:
        name = name_map.get_name(one.path)
        if name in ("token_embd", "output", None) and (name is None or config.tie_word_embeddings):
            reason = "whose embeddings are its output head too" if name else "which has no name for it"
            raise ValueError(
                f"--adapter should be given for an adapter that llama.cpp can apply, but this one changes "
                f"{one.path} of a model {reason}: use --to gguf without it."
            )
        names.append(name)
    return names


def order_rows(b: Tensor, path: str, config: Any) -> Tensor:
    """The rows of B in the order of the base's: with llama, the two that a rotation mixes side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if ARCHITECTURES[config.model_type] != "llama" or (name := path.rpartition(".")[2]) not in heads:
        return b
    return rearrange(b, "(head half pair) r -> (head pair half) r", head=heads[name], half=2)
