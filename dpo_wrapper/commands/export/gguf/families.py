"""The families of models that are written as GGUF files, by the names of transformers and of llama.cpp."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Family:
    """What llama.cpp expects of a family of models.

    Attributes:
        architecture: llama.cpp's name of it.
        model_class, config_class: transformers' names of what computes the same.
        interleaves_rope: whether rows of query and key are reordered so that the two halves that rotary
            positions turn alternate.
        norm_offset: what is added to the weights of norms, as transformers adds it in each forward pass.
        rope_types: kinds of rotary positions that llama.cpp computes for it.
        required: values that settings of the model should have, as llama.cpp knows no others.
        window_period: one layer in so many sees all tokens, the others a sliding window; None where
            llama.cpp has no sliding window.
        llama_cpp_rounding: by how much of their spread logits differ in llama.cpp in float32 too, because it
            reads the GELU from a table in float16.
        full_head_size_layers: the number of layers with which scores are divided by the root of the width
            per head in place of the head's own size.
    """

    architecture: str
    model_class: str
    config_class: str
    interleaves_rope: bool = False
    norm_offset: float = 0.0
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    required: Mapping[str, Any] = field(default_factory=dict)
    window_period: int | None = None
    full_head_size_layers: int | None = None
    llama_cpp_rounding: float = 0.0


SILU = {"hidden_act": "silu"}
GELU = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}

LLAMA = Family(
    "llama", "LlamaForCausalLM", "LlamaConfig", True, 0.0, ("default", "linear", "yarn", "llama3"), SILU
)
gemma = partial(Family, norm_offset=1.0, llama_cpp_rounding=1e-3, rope_types=("default", "linear"))

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", required=SILU),
    "Qwen3ForCausalLM": Family(
        "qwen3", "Qwen3ForCausalLM", "Qwen3Config", required=SILU | {"attention_bias": False}
    ),
    "GemmaForCausalLM": gemma(
        "gemma",
        "GemmaForCausalLM",
        "GemmaConfig",
        required={"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
    ),
    "Gemma2ForCausalLM": gemma(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        required=GELU,
        window_period=2,
        full_head_size_layers=46,
    ),
    "Gemma3ForCausalLM": gemma(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        required=GELU | {"attn_logit_softcapping": None, "use_bidirectional_attention": False},
        window_period=6,
        full_head_size_layers=62,
    ),
    "Phi3ForCausalLM": Family(
        "phi3", "Phi3ForCausalLM", "Phi3Config", rope_types=("default", "longrope"), required=SILU
    ),
}
"""By the class of transformers' model."""

REMEDY = "use --to merged, and llama.cpp's own convert_hf_to_gguf.py"


def find_family(model: Any) -> Family:
    """The family of a model of transformers.

    Raises:
        ValueError: it is none of `FAMILIES`, or has settings that llama.cpp does not know.
    """
    name = type(model).__name__
    family = FAMILIES.get(name)
    if family is None:
        known = ", ".join(FAMILIES)
        raise ValueError(f"--to gguf writes {known}, but the model is a {name}: {REMEDY}.")
    for setting, value in family.required.items():
        check_setting(model, setting, getattr(model.config, setting, value), value)
    return family


def check_setting(model: Any, setting: str, found: Any, wanted: Any) -> None:
    """Raise ValueError for a setting with a value that llama.cpp does not compute."""
    if found != wanted:
        raise ValueError(
            f"{setting} of a {type(model).__name__} should be {wanted} for llama.cpp, but it is {found}: "
            f"{REMEDY}."
        )


def architecture_id(family: Family) -> Any:
    """The architecture as the gguf package names it."""
    from gguf import MODEL_ARCH_NAMES

    return next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.architecture)
