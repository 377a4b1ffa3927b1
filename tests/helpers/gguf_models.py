"""Tiny models of every family that GGUF files are written for, with a tokenizer, and what they say."""

from pathlib import Path
from typing import Any

from dpo_wrapper.commands.export.agreement import PromptOutput, compute_outputs
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from helpers.models import randomise_, seeded

PROMPTS = ("How are you today? I am 123", "user  assistant\n\n" + "x" * 20)
THETA = {"rope_theta": 10000.0}
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 256,
    "short_factor": [1 + 0.1 * k for k in range(8)],
    "long_factor": [2.0 + k for k in range(8)],
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "attn_implementation": "eager"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-3": ("LlamaConfig", {"rope_parameters": THETA | LLAMA_3 | {"rope_type": "llama3", "factor": 8.0}}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN | {"attention_factor": 1.5, "beta_fast": 16.0}}),
    "mistral": ("MistralConfig", {"sliding_window": 128, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied-yarn": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 128}),
    "phi3-long": (
        "Phi3Config",
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": THETA | LONG,
        },
    ),
    "phi4-partial": ("Phi3Config", {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}),
}
"""Transformers' configuration and its options, by name."""


def make_model(config_class: str, **options: object) -> Any:
    """A model whose random weights are large enough that a mistake shows, in eval mode."""
    import transformers

    sizes = {
        "vocab_size": 448,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = getattr(transformers, config_class)(**(sizes | ids | options))
    with seeded(0):
        model = transformers.AutoModelForCausalLM.from_config(config)
        return randomise_(model, std=0.15).eval()


def make_known_model(name: str) -> Any:
    """One of `MODELS`."""
    config_class, options = MODELS[name]
    return make_model(config_class, **options)


def ask(model: Any, tokenizer: HuggingFaceTokenizer) -> list[PromptOutput]:
    """What a model says of prompts long enough for windows and rotary positions to matter."""
    return compute_outputs(model, tokenizer, PROMPTS, 8, as_chat=tokenizer.has_chat_template)


def make_piece_tokenizer(**options: Any) -> HuggingFaceTokenizer:
    """A BPE with byte tokens as converted from SentencePiece: all pairs that make a token are merges.

    Args:
        options: `prefix` for a space in front of each text (True by default), `puts_bos` and `template`.
    """
    import json

    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    words = ["he", "is", "ho", "ar", "at", "to", "da", "▁a", "▁y", "ow", "re", "▁th", "ou", "▁you", "are"]
    words += ["day", "▁to", "▁today", "▁are", "▁H", "▁How", "user", "▁user", "▁▁", "us", "er", "xx", "xxxx"]
    letters = sorted({letter for word in words for letter in word} | set("HIm?.,123 "[:-1]))
    specials = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*words, "th", "ay", "Ho"]
    vocab = {token: k for k, token in enumerate([*specials, *bytes_, *pieces, *letters])}
    splits = [(word[:k], word[k:]) for word in pieces for k in range(1, len(word))]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if options.get("prefix", True) else []
    parts = json.loads(Tokenizer.from_str(EMPTY).to_str())
    parts["model"] |= {"vocab": vocab, "merges": [pair for pair in splits if set(pair) <= vocab.keys()]}
    parts["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, space]}
    model = Tokenizer.from_str(json.dumps(parts))
    model.add_special_tokens(specials)
    if options.get("puts_bos", True):
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = options.get("template")
    return HuggingFaceTokenizer(tokenizer)


EMPTY = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": null, "post_processor": null, "decoder": null, "model": {"type": "BPE", "dropout": null,
"unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
"byte_fallback": true, "ignore_merges": false, "vocab": {"<unk>": 0}, "merges": []}}"""


def set_value(file: Path, key: str, value: object, position: int = 0) -> None:
    """Write another number in place of one in a GGUF file's keys."""
    from gguf import GGUFReader

    reader = GGUFReader(file, "r+")
    field = reader.fields[key]
    field.parts[field.data[position]][0] = value
    reader.data.flush()


def edit_tensor(file: Path, name: str, edit: Any) -> None:
    """Change a tensor of a GGUF file in float32 in place."""
    from gguf import GGUFReader

    reader = GGUFReader(file, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    tensor.data[:] = edit(tensor.data.copy())
    reader.data.flush()
