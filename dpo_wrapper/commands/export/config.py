"""Settings of `dpo-wrapper export`. The command line is generated from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dpo_wrapper.data.config import flag

Format = Literal["merged", "peft", "mlx", "gguf", "ollama", "x-transformers"]
Quantization = Literal["none", "q8_0", "q4_k_m"]
WeightDtype = Literal["float32", "bfloat16", "float16"]

DEFAULT_PROMPTS = (
    "How do I keep bread fresh?",
    "Write a short letter to a friend who is ill.",
    "def is_prime(n: int) -> bool:",
)
"""What an export is tried on where no prompts are given."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained model in the form that another program takes, read it back, and compare the two.

    Each export has a folder of its own in --out, which is named as the format. It is said to be done when its
    logits and the tokens that it writes are those of the model; otherwise the command ends with status 1.

    Raises:
        ValueError: an option has a value that cannot be, or options contradict each other.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, folder of an adapter, or Hugging Face model by folder or name."""
    to: tuple[Format, ...]
    """One or more of these. merged: a Hugging Face folder without adapter; peft: the adapter for PEFT; mlx:
    the adapter for mlx-lm; gguf: a file for llama.cpp, of the adapter with --adapter and else of the whole
    model; ollama: that file with a Modelfile; x-transformers: weights and three lines that load them."""
    out: Path
    """The folder that the exports are written to."""
    dtype: WeightDtype = "bfloat16"
    """Of the weights of a merged model, and of a GGUF file that is not quantized."""
    quantize: Quantization = "none"
    """How the weights of a GGUF file are quantized, from those of the merged model, once."""
    adapter: bool = False
    """For gguf and ollama: export the adapter alone, for a base that is a GGUF file already."""
    base: Path | None = None
    """With --adapter: the GGUF file of the base, on which the adapter is tried."""
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    """What the export and the model are compared on."""
    num_tokens: int = 16
    """Number of tokens that both write after each prompt."""
    check: bool = False
    """Write nothing: say whether exports that are there are as they were when they were compared."""

    def __post_init__(self) -> None:
        if not self.to:
            raise ValueError("--to should name at least one format, but it names none: give one.")
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"--to should name each format once, but it is {' '.join(self.to)}.")
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("--prompts should hold texts, but one is empty: leave it out.")
        if self.num_tokens < 1:
            raise ValueError(
                f"--num-tokens should be at least 1, but it is {self.num_tokens}: give another value."
            )
        self._check_takers("quantize", "gguf", "ollama")
        self._check_takers("adapter", "gguf", "ollama")
        whole: tuple[Format, ...] = () if self.adapter else ("gguf", "ollama")
        self._check_takers("dtype", "merged", *whole)
        if self.adapter and self.quantize != "none":
            raise ValueError(
                f"--quantize should be left out where the adapter is exported alone, but it is "
                f"{self.quantize}: an adapter is small as it is."
            )
        if self.base is not None and not self.adapter:
            raise ValueError(
                "--base should be given with --adapter, but that is missing: give it, or leave both."
            )

    def _check_takers(self, option: str, *formats: Format) -> None:
        """Raise ValueError if an option is given that none of the formats reads."""
        is_given = getattr(self, option) != getattr(type(self), option)
        if is_given and not set(formats) & set(self.to):
            raise ValueError(
                f"{flag(option)} should be given with --to {' or '.join(formats)}, but --to is "
                f"{' '.join(self.to)}: leave it out."
            )
