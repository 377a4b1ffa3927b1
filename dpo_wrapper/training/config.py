"""What a training run may be told. The command line is generated from this; it imports nothing heavy."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from dpo_wrapper.losses.describe import help_text

PRESETS = {
    "tiny": {"dim": 128, "depth": 4, "heads": 2},
    "small": {"dim": 256, "depth": 6, "heads": 4},
    "medium": {"dim": 512, "depth": 8, "heads": 8},
}
"""Decoders built from scratch, by name."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model on preference pairs: from a file of them to a folder with the better model."""

    data: Path
    """File of preferences: .jsonl, .json (either may be gzipped) or .parquet. Rows are pairs, ranked lists of
    completions or, for KTO, completions with a label."""
    out: Path = Path("runs/dpo")
    """Run folder; it must be new or empty, unless --resume is given."""
    eval_data: Path | None = None
    """File of held-out preferences. Without it they come from --data: rows whose column `split` says test,
    or else a part of the prompts."""
    eval_fraction: float = 0.1
    """Part of the rows held out where no row has a split and there is no --eval-data; 0 holds out none."""
    prompt_field: str | None = None
    """Field with the prompt; by default prompt, text, conversations or messages, whichever is there."""
    chosen_field: str = "chosen"
    """Field with the preferred completion."""
    rejected_field: str = "rejected"
    """Field with the other completion."""
    ranking: Literal["all", "best"] | None = None
    """Which pairs a ranked list gives to a loss of pairs: all (the default), or the best with each other."""
    as_chat: bool = False
    """Take a prompt that is plain text for one user turn of a dialogue."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, and say how many, instead of stopping at the first."""

    model: str = "tiny"
    """tiny, small or medium (a new x-transformers decoder), a folder that this command wrote, or a Hugging
    Face model by folder or name."""
    tokenizer: str | None = None
    """bytes, or a Hugging Face tokenizer by folder or name; by default the model's own (if new, bytes)."""
    max_length: int = 512
    """Longest sequence in tokens: prompts are shortened from the front first, then completions are cut."""

    loss: Annotated[str, Doc(help_text())] = "sigmoid(beta=0.1) + 1.0*sft"
    reference: Literal["auto", "copy", "none"] = "auto"
    """What the policy is held against: a frozen copy of where it starts, or nothing."""
    reference_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the copy is kept in, if not in the policy's dtype; half the memory in bfloat16."""
    reference_device: str | None = None
    """Where the copy is kept, if not beside the policy: cpu spares an accelerator's memory."""
    precompute_reference: bool = False
    """Compute the reference's log-probs of all data before training, into the folder `reference` of --out,
    and train without a reference in memory. Without this the first epoch computes them as it goes."""
    sync_every: int = 0
    """TR-DPO: steps between updates of the reference from the policy; 0 leaves it where it is."""
    sync_alpha: float = 0.6
    """TR-DPO: the policy's part in each such update; 1 takes the policy over."""

    ld_alpha: float = 1.0
    """LD-DPO: below 1, what the longer side of a pair has more than the other counts only so much."""
    wpo: bool = False
    """WPO: each pair counts as much as its completions are like what the policy writes itself."""

    sft_epochs: int | None = None
    """Epochs of warm-up on prompt and chosen, before preferences; by default 10 for a new model, else 0."""
    sft_lr: float | None = None
    """Highest learning rate of the warm-up; by default 2e-3 for a new model and 1e-5 for others."""
    epochs: int = 3
    """Epochs of preference training."""
    lr: float | None = None
    """Highest learning rate of preference training; by default 1e-4 for a new model and 1e-6 for others."""
    batch_size: int = 16
    """Pairs (lists, rows) per optimizer step, over all processes."""
    max_tokens: int = 16384
    """Unique tokens per forward pass (tokens that pairs share count once): what fits in memory. A step takes
    as many passes as it needs, with the same result."""
    workers: int = 0
    """Processes that make batches ahead of training; 0 makes them in between."""
    warmup: float = 0.1
    """Part of the steps in which the learning rate rises; then it falls to zero along a cosine."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward and backward pass."""
    cpu: bool = False
    """Train on the CPU even if there is an accelerator."""
    seed: int = 0
    """Seed of initialisation, order and held-out part."""
    eval_every: int | None = None
    """Steps between evaluations on the held-out part; by default about eight over the run."""
    save_every: int = 200
    """Steps between checkpoints to resume from; 0 for none."""
    resume: bool = False
    """Continue an interrupted run in --out; everything else must be as it was."""

    def __post_init__(self) -> None:
        for name in ("sft_epochs", "epochs", "save_every", "workers", "sync_every"):
            self._check(name, lambda value: value >= 0, "0 or more")
        for name in ("batch_size", "max_tokens", "eval_every"):
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in ("lr", "sft_lr", "max_grad_norm"):
            self._check(name, lambda value: value > 0 and math.isfinite(value), "a positive number")
        self._check("ld_alpha", lambda value: 0 <= value <= 1, "from 0 to 1")
        self._check("sync_alpha", lambda value: 0 < value <= 1, "above 0 and at most 1")
        if self.sync_every and self.precompute_reference:
            raise ValueError(
                "--precompute-reference is for a reference that stays still, and --sync-every moves it: "
                "leave one of them out."
            )
        if self.precompute_reference and (self.reference_dtype or self.reference_device):
            raise ValueError(
                "--reference-dtype and --reference-device are about a copy that stays in memory, and "
                "--precompute-reference keeps none: leave one of them out."
            )
        if self.sync_alpha != 0.6 and not self.sync_every:
            raise ValueError("--sync-alpha has no effect without --sync-every: give both, or neither.")
        self._check("weight_decay", lambda value: 0 <= value < 1, "in [0, 1)")
        self._check("max_length", lambda value: value >= 8, "at least 8")
        for name in ("eval_fraction", "warmup"):
            self._check(name, lambda value: 0 <= value < 1, "in [0, 1)")
        if self.eval_data is not None and self.eval_data == self.data:
            raise ValueError(
                "--eval-data is the same file as --data: leave it out to hold out a part of --data."
            )

    def _check(self, name: str, fits: Any, expected: str) -> None:
        value = getattr(self, name)
        if value is not None and not fits(value):
            raise ValueError(f"--{name.replace('_', '-')} should be {expected}, but it is {value}.")

    @property
    def fresh(self) -> bool:
        """Whether the model is made anew."""
        return self.model in PRESETS

    @property
    def warm_up_epochs(self) -> int:
        return self.sft_epochs if self.sft_epochs is not None else 10 if self.fresh else 0

    def as_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
