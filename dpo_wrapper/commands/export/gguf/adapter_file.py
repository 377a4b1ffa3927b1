"""The file of a LoRA adapter for llama.cpp."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo_wrapper.commands.export.gguf.base_file import check_base_file, has_head
from dpo_wrapper.commands.export.gguf.families import Family, architecture_id, find_family
from dpo_wrapper.commands.export.gguf.storage import write_file
from dpo_wrapper.commands.export.gguf.tensors import interleave_halves
from dpo_wrapper.commands.export.lora_factors import LoraFactors, list_lora_factors
from dpo_wrapper.pretrained.gguf_adapter import import_gguf


def check_adapter(model: Any, base_name: str, base_file: Path | None) -> None:
    """Raise for an adapter that llama.cpp cannot apply, or not to a file of the base.

    Args:
        model: PEFT's.
        base_name: folder or name of the base.
        base_file: as `--base` names it.

    Raises:
        ValueError: the adapter has other parts than llama.cpp knows, or the file is not one of the base.
        ImportError: the library that reads and writes files is missing.
    """
    import_gguf()
    factors = list_lora_factors(model, "gguf --adapter")
    if not factors:
        raise ValueError("--adapter should be given for an adapter with factors, but this one has none.")
    base = model.get_base_model()
    family = find_family(base)
    if base_file is not None:
        check_base_file(base_file, base, family, base_name)
    name_tensors(factors, family, base.config, has_head=has_head(base, base_file))


def write_adapter_file(
    factors: Sequence[LoraFactors], file: Path, family: Family, config: Any, base: str
) -> None:
    """Write the factors in float32, as llama.cpp applies them: x -> W x + alpha / r · B A x.

    The file has one alpha. Factors of another scale have theirs in B.

    Args:
        factors: of an adapter that `check_adapter` has seen.
        file: is new.
        family: of the model which the adapter stands on.
        config: transformers' configuration of that model.
        base: folder or name of that model.
    """
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
    for one, name in zip(factors, name_tensors(factors, family, config, has_head=True), strict=True):
        a = one.a.T if one.is_embedding else one.a
        b = order_rows(one.b, one.path, family, config) * (one.scale * one.rank / alpha)
        writer.add_tensor(f"{name}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
    write_file(writer)


def name_tensors(factors: Sequence[LoraFactors], family: Family, config: Any, *, has_head: bool) -> list[str]:
    """What llama.cpp calls the weights that factors change; ValueError where it cannot change one.

    `has_head` is whether the base's file has an output head beside the embeddings.
    """
    names = import_gguf().get_tensor_name_map(architecture_id(family), config.num_hidden_layers)
    found = [(one.path, names.get_name(f"{one.path}.weight", try_suffixes=(".weight",))) for one in factors]
    for path, name in found:
        reason = None
        if name is None:
            reason = "for which it has no name"
        elif name in ("token_embd.weight", "output.weight") and not has_head:
            reason = "and the base's embeddings are its output head too"
        if reason is not None:
            raise ValueError(
                f"--adapter should be given for an adapter that llama.cpp can apply, but this one changes "
                f"{path}, {reason}: leave --adapter out, so that the whole model is exported."
            )
    return [name for _, name in found]


def order_rows(b: Tensor, path: str, family: Family, config: Any) -> Tensor:
    """The rows of B in the order of the base's."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = path.rpartition(".")[2]
    return interleave_halves(b, heads[part]) if family.interleaves_rope and part in heads else b
