"""Options of adapters: a new LoRA adapter, or one that is continued."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path

from dpo_wrapper.training.options.base import Options, flag

INITIALISATIONS = ("default", "gaussian", "orthogonal", "mica", "olora", "pissa", "pissa_niter_16")
"""Initialisations of PEFT that need no data; the number of pissa_niter may be another."""

INITIALISATIONS_FROM_DATA = ("corda", "eva", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """Whether a small adapter is trained on top of a frozen model, which is PEFT's work."""

    lora: bool = False
    """Train a new LoRA adapter on top of --model, whose weights stay as they are. If --model is itself the
    folder of an adapter, that adapter is merged into its base in memory first."""
    adapter: Path | None = None
    """Folder of an adapter to continue. Its base is --model or, without it, the one that the adapter names.
    --model with the folder of an adapter does the same."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: float | None = None
    """What the adapter does is multiplied by alpha / r, with --use-rslora by alpha / √r. By default alpha is
    2 r, with --use-rslora 8: at rank 16 the factor is 2 in both cases."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapter. Above 0 the policy is computed with dropout, the model's own
    included, in preference training too, and the reference without."""
    lora_targets: tuple[str, ...] | None = None
    """Layers to adapt: names, or one regular expression over whole names. By default all linear layers of
    the model's blocks: attention and feed-forward, without embeddings and output head."""
    lora_layers: str | None = None
    """Numbers of the blocks to adapt, as in the names of modules: 20-29, or 0,2,28-29. By default all."""
    lora_init: str = "default"
    """Initial weights, as PEFT has them: default, gaussian, orthogonal, mica, olora, pissa or
    pissa_niter_16. The last three start from the main directions of the weights, and what is saved is
    converted to a plain adapter of twice the rank, for the base as it is."""
    use_dora: bool = False
    """DoRA: train the magnitudes of the adapted weights beside their directions."""
    use_rslora: bool = False
    """rsLoRA: scale by alpha / √r, which keeps high ranks learning."""
    load_in_4bit: bool = False
    """Load the frozen base in 4 bits (QLoRA, NF4). Needs bitsandbytes and a CUDA device."""

    def __post_init__(self) -> None:
        self.check("lora_r", lambda value: value >= 1, "at least 1")
        self.check("lora_alpha", lambda value: 0 < value < math.inf, "a positive number")
        self.check("lora_dropout", lambda value: 0 <= value < 1, "in [0, 1)")
        self.check("lora_targets", lambda value: len(value) > 0, "one name or more")
        self.check("lora_layers", lambda value: parse_layers(value) is not None, "like 20-29 or 0,2,28-29")
        self._check_init()
        if self.lora and self.adapter is not None:
            raise ValueError(
                "--adapter should be left out if --lora is given, but both are: --adapter continues an "
                "adapter, and --model ADAPTER --lora merges it and trains a new one."
            )
        if not self.lora:
            for field in fields(LoraOptions):
                is_of_new = field.name.startswith(("lora_", "use_"))
                if is_of_new and getattr(self, field.name) != field.default:
                    name = flag(field.name)
                    why = "--adapter continues one" if self.adapter is not None else "--lora is not given"
                    remedy = "leave it out" if self.adapter is not None else "add --lora, or leave it out"
                    raise ValueError(f"{name} is an option of a new adapter, but {why}: {remedy}.")

    def _check_init(self) -> None:
        init = self.lora_init
        if init.startswith(INITIALISATIONS_FROM_DATA) or init == "loftq":
            why = "quantizes the base by itself" if init == "loftq" else "is computed from batches of data"
            raise ValueError(
                f"--lora-init should be one of {', '.join(INITIALISATIONS)}, but {init} {why}: make that "
                "adapter by PEFT's own script, save it, and give its folder as --adapter."
            )
        if init not in INITIALISATIONS and not re.fullmatch(r"pissa_niter_[1-9]\d*", init):
            raise ValueError(
                f"--lora-init should be one of {', '.join(INITIALISATIONS)}, but it is {init}: choose one."
            )
        if init == "orthogonal" and self.lora_r % 2:
            raise ValueError(
                f"--lora-r should be even for --lora-init orthogonal, but it is {self.lora_r}: add 1."
            )
        if self.changes_base_weights and self.use_dora:
            raise ValueError(
                f"--use-dora should be left out with --lora-init {init}, but it is given: leave one of them "
                "out, for their adapter cannot be converted to one for the base as it is."
            )
        if self.load_in_4bit and init not in ("default", "gaussian", "orthogonal"):
            raise ValueError(
                f"--lora-init should be default, gaussian or orthogonal with --load-in-4bit, but {init} "
                "needs the base's weights in full: choose one, or leave --load-in-4bit out."
            )

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter alone trains, and not the model's own weights."""
        return self.lora or self.adapter is not None

    @property
    def changes_base_weights(self) -> bool:
        """Whether the initialisation takes what the adapter starts with out of the weights of the base."""
        return self.lora_init.startswith(("pissa", "olora"))


def parse_layers(text: str) -> list[int] | None:
    """The numbers in `0,2,28-29`, ascending; None for another text."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            return None
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(numbers)
