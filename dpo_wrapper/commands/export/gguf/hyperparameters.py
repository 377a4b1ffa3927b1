"""The settings of a model as keys of a GGUF file."""

from math import log
from typing import Any

from dpo_wrapper.commands.export.gguf.families import Family, check_setting


def add_hyperparameters(writer: Any, model: Any, family: Family) -> list[str]:
    """Add the settings of a model of transformers; returns sentences on what a user should know.

    Raises:
        ValueError: a setting has a value that llama.cpp does not know.
    """
    config = model.config
    heads, head_dim = config.num_attention_heads, read_head_dim(config)
    check_heads(model, family, head_dim)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(model.get_input_embeddings().weight))
    for setting, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, setting, None) is not None:
            add(getattr(config, setting))
        elif family.architecture == "gemma2":  # where llama.cpp takes 50 and 30
            check_setting(model, setting, None, "a number")
    return [*add_rope(writer, model, family, head_dim), *add_window(writer, model, family)]


def read_head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_heads(model: Any, family: Family, head_dim: int) -> None:
    """Raise ValueError for sizes and scales of heads that llama.cpp does not compute."""
    config = model.config
    width_per_head = config.hidden_size // config.num_attention_heads
    if family.architecture == "phi3":
        check_setting(model, "head_dim", head_dim, width_per_head)
    if family.window_period is not None:
        is_wide = config.num_hidden_layers == family.full_head_size_layers
        scale = width_per_head if is_wide else head_dim
        check_setting(model, "query_pre_attn_scalar", config.query_pre_attn_scalar, scale)


def add_rope(writer: Any, model: Any, family: Family, head_dim: int) -> list[str]:
    """Add what rotary positions are made of; factors by frequency are tensors of their own.

    Returns a sentence where llama.cpp chooses among these in another way than transformers.
    """
    config = model.config
    rope = read_rope(config, "full_attention")
    kind = rope.get("rope_type", "default")
    if kind not in family.rope_types:
        check_setting(model, "rope_type", kind, " or ".join(family.rope_types))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if "partial_rotary_factor" in rope and family.architecture != "phi3":
        check_setting(model, "partial_rotary_factor", rope["partial_rotary_factor"], 1.0)
    if kind in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        add_yarn(writer, model, rope)
    notes = []
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(model.model.rotary_emb.attention_scaling)
        notes.append(
            f"llama.cpp takes the positions of long texts wherever its context is above {original} tokens, "
            f"the model where a text is: run it with -c {original} for texts that are shorter."
        )
    if family.architecture == "gemma3":
        local = read_rope(config, "sliding_attention")
        check_setting(model, "rope_type of local layers", local.get("rope_type", "default"), "default")
        writer.add_rope_freq_base_swa(local["rope_theta"])
    return notes


def read_rope(config: Any, layer_type: str) -> dict[str, Any]:
    """The rotary positions of one type of layers."""
    rope = config.rope_parameters
    return rope.get(layer_type, rope)


def add_yarn(writer: Any, model: Any, rope: dict[str, Any]) -> None:
    """Add YaRN's settings; llama.cpp scales queries and keys by 1 + ln(factor) / 10 by itself."""
    for name, value in (("truncate", True), ("mscale", None), ("mscale_all_dim", None)):
        check_setting(model, f"{name} of YaRN", rope.get(name, value), value)
    original = rope.get("original_max_position_embeddings") or model.config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    usual = 0.1 * log(rope["factor"]) + 1
    writer.add_rope_scaling_attn_factors(model.model.rotary_emb.attention_scaling / usual)


def add_window(writer: Any, model: Any, family: Family) -> list[str]:
    """Add the sliding window; a sentence where llama.cpp has none."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if family.window_period is not None:
        period = family.window_period
        wanted = [
            "full_attention" if k % period == period - 1 else "sliding_attention" for k in range(len(types))
        ]
        check_setting(model, "layer_types", types, wanted)
        writer.add_sliding_window(window)
        return []
    if family.architecture == "phi3":
        writer.add_sliding_window(window or 0)  # older versions of llama.cpp refuse a file without it
    has_window = window is not None and window < config.max_position_embeddings
    is_sliding = config.model_type in ("mistral", "phi3") or "sliding_attention" in types
    if not (has_window and is_sliding):
        return []
    return [
        f"llama.cpp has no sliding window for this architecture: beyond {window} tokens it sees more of the "
        "text than the model does."
    ]
