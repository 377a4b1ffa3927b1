"""GGUF files in transformers, with the settings and the vocabulary that the file itself holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.commands.export.agreement import Logits
from dpo_wrapper.commands.export.gguf.families import FAMILIES
from dpo_wrapper.commands.export.gguf.file_tokenizer import FileTokenizer
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.commands.export.weights import WeightDigests
from dpo_wrapper.pretrained.gguf_file import load_gguf


class GGUFFileReader:
    """A GGUF file whose settings, tensors and vocabulary are all read back.

    Args:
        file: the model.
        weights: what it should hold; None where that is compared by its logits alone.

    Raises:
        ExportError: it holds other weights.
    """

    def __init__(self, file: Path, weights: WeightDigests | None = None) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        shapes = {tensor.name: tensor for tensor in reader.tensors}
        self._tokenizer = FileTokenizer(fields)
        self.name = "the file read back by transformers"
        self._module = ModuleReader(self.name, lambda: load_model(file, fields, shapes), weights)

    def compute_logits(self, ids: Sequence[int]) -> Logits:
        return self._module.compute_logits(ids)

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.tokenize(text)

    def close(self) -> None:
        self._module.close()


def load_model(file: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """The model in float32, with what its settings and tensors in the file say."""
    model = load_gguf(file, read_config(fields, tensors), torch.float32)
    factors = tensors.get("rope_freqs.weight")
    if factors is not None:
        rotary = model.model.rotary_emb
        exponents = torch.arange(len(rotary.inv_freq)) / len(rotary.inv_freq)
        base = fields[f"{fields['general.architecture']}.rope.freq_base"]
        rotary.inv_freq = base**-exponents / torch.tensor(factors.data)
    return model


def read_config(fields: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """The configuration of transformers for the settings in a file."""
    import transformers

    architecture = fields["general.architecture"]
    family = next(family for family in FAMILIES.values() if family.architecture == architecture)

    def read(name: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{name}", default)

    options: dict[str, Any] = {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": read("embedding_length"),
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": read("attention.head_count"),
        "num_key_value_heads": read("attention.head_count_kv"),
        "head_dim": read("attention.key_length"),
        "max_position_embeddings": read("context_length"),
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "rope_parameters": read_rope(read, tensors),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": None,
    }
    if family.window_period is not None:
        is_wide = options["num_hidden_layers"] == family.full_head_size_layers
        width = options["hidden_size"] // options["num_attention_heads"]
        options |= {
            "sliding_window": read("attention.sliding_window"),
            "attn_logit_softcapping": read("attn_logit_softcapping"),
            "final_logit_softcapping": read("final_logit_softcapping"),
            "query_pre_attn_scalar": width if is_wide else options["head_dim"],
            "attn_implementation": "eager",
        }
    if architecture == "phi3":
        options["sliding_window"] = read("attention.sliding_window") or None
        options["original_max_position_embeddings"] = read(
            "rope.scaling.original_context_length", options["max_position_embeddings"]
        )
    return getattr(transformers, family.config_class)(**options)


def read_rope(read: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions of a file, as transformers has them."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": read("rope.freq_base")}
    rotated = read("rope.dimension_count") / read("attention.key_length")
    if rotated < 1:
        rope["partial_rotary_factor"] = rotated
    kind = read("rope.scaling.type", "default")
    attention = read("rope.scaling.attn_factor", 1.0)
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": read("rope.scaling.factor")}
    if kind == "yarn":
        usual = 0.1 * torch.tensor(rope["factor"]).log().item() + 1
        rope |= {
            "original_max_position_embeddings": read("rope.scaling.original_context_length"),
            "beta_fast": read("rope.scaling.yarn_beta_fast"),
            "beta_slow": read("rope.scaling.yarn_beta_slow"),
            "attention_factor": attention * usual,
        }
    if "rope_factors_long.weight" in tensors:
        rope |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": read("rope.scaling.original_context_length"),
            "long_factor": tensors["rope_factors_long.weight"].data.tolist(),
            "short_factor": tensors["rope_factors_short.weight"].data.tolist(),
            "attention_factor": attention,
        }
    local = read("rope.freq_base_swa")
    if local is None:
        return rope
    return {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
