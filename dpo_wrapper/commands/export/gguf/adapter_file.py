"""The file of a LoRA adapter for llama.cpp."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_wrapper.commands.export.gguf.families import Family, architecture_id
from dpo_wrapper.commands.export.gguf.tensors import interleave_halves
from dpo_wrapper.commands.export.lora_factors import LoraFactors
from dpo_wrapper.pretrained.gguf_adapter import import_gguf


def write_adapter_file(
    factors: Sequence[LoraFactors], file: Path, family: Family, config: Any, base: str, *, has_own_head: bool
) -> None:
    """Write the factors in float32, as llama.cpp applies them: x -> W x + alpha / r · B A x.

    The file has one alpha. Factors of another scale have theirs in B.

    Args:
        factors: of the adapter.
        file: is new.
        family: of the model which the adapter stands on.
        config: transformers' configuration of that model.
        base: folder or name of that model.
        has_own_head: whether its GGUF file has an output head beside the embeddings.

    Raises:
        ValueError: llama.cpp cannot apply a factor.
    """
    names = [name_tensor(one.path, family, config, has_own_head=has_own_head) for one in factors]
    if not names:
        raise ValueError("--adapter should be given for an adapter with factors, but this one has none.")
    gguf = import_gguf()
    writer = gguf.GGUFWriter(file, family.architecture)
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
        b = order_rows(one.b, one.path, family, config) * (one.scale * one.rank / alpha)
        writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def name_tensor(path: str, family: Family, config: Any, *, has_own_head: bool) -> str:
    """What llama.cpp calls the weight of a module; ValueError where it cannot change it."""
    names = import_gguf().get_tensor_name_map(architecture_id(family), config.num_hidden_layers)
    name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
    reason = None
    if name is None:
        reason = "for which it has no name"
    elif name in ("token_embd.weight", "output.weight") and not has_own_head:
        reason = "and the base's embeddings are its output head too"
    if name is None or reason is not None:
        raise ValueError(
            f"--adapter should be given for an adapter that llama.cpp can apply, but this one changes "
            f"{path}, {reason}: leave --adapter out, so that the whole model is exported."
        )
    return str(name)


def order_rows(b: Tensor, path: str, family: Family, config: Any) -> Tensor:
    """The rows of B in the order of the base's."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = path.rpartition(".")[2]
    return interleave_halves(b, heads[part]) if family.interleaves_rope and part in heads else b
