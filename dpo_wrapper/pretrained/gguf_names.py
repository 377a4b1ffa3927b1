"""How GGUF files name the linear layers of transformers, and in which order they have their rows."""

from torch import Tensor

EMBEDDING = "model.embed_tokens"

_MODULES = {"token_embd": EMBEDDING, "output": "lm_head"}
_LAYER_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_module(name: str, architecture: str) -> str | None:
    """The path of a module in transformers' model by its name in a file, such as `blk.0.attn_q`, or None."""
    if not name.startswith("blk."):
        return _MODULES.get(name)
    _, layer, part = name.split(".", 2)
    module = "mlp.gate_up_proj" if (architecture, part) == ("phi3", "ffn_up") else _LAYER_MODULES.get(part)
    return None if module is None else f"model.layers.{layer}.{module}"


def restore_rows(
    rows: Tensor, path: str, architecture: str, num_heads: int, num_key_value_heads: int
) -> Tensor:
    """The rows of a module's weight in the order in which transformers has them.

    Files of the llama architecture have those of queries and keys so that the two rows which a rotation mixes
    stand beside each other; in transformers they are half a head apart.
    """
    heads = {"q_proj": num_heads, "k_proj": num_key_value_heads}.get(path.rpartition(".")[2])
    if architecture != "llama" or heads is None:
        return rows
    by_head = rows.reshape(heads, -1, *rows.shape[1:])
    return by_head[:, [*range(0, by_head.shape[1], 2), *range(1, by_head.shape[1], 2)]].reshape(rows.shape)
