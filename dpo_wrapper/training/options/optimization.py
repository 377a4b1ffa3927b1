"""Options of the stages of a run and of their optimizer."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from dpo_wrapper.training.options.base import Options

StageName = Literal["pretrain", "sft", "dpo"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""The stages of a run, in their order."""


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(Options):
    """What is trained in which order, how long and how fast."""

    stage: tuple[StageName, ...] | None = None
    """What to train on, in this order: pretrain (documents), sft (completions of prompts, or the best ones of
    preferences) and dpo (preferences). By default what the data holds; preferences are learned by sft first
    if --sft-epochs is not 0."""
    pretrain_epochs: int = 1
    """Epochs of training on documents."""
    pretrain_learning_rate: float | None = None
    """Peak learning rate of training on documents; by default that of supervised training."""
    sft_epochs: int | None = None
    """Epochs of supervised training. By default 10 for a new model; for others 1 if there is data for it or
    --stage asks for it, else 0."""
    sft_learning_rate: float | None = None
    """Peak learning rate of supervised training; by default 2e-3 for a new model and 1e-5 for others."""
    train_on_prompt: bool | None = None
    """Whether supervised training learns the prompts of preferences as well as their best completions. By
    default it does for a new model that has not been pretrained."""
    epochs: int = 3
    """Epochs of preference training."""
    learning_rate: Annotated[float | None, tyro.conf.arg(aliases=["--lr"])] = None
    """Peak learning rate of preference training; by default 1e-4 for a new model and 1e-6 for others."""
    batch_size: int = 16
    """Pairs (lists, rows) per optimizer step, over all processes."""
    micro_batch_tokens: int = 16384
    """Maximum number of tokens per forward pass: what fits in memory. A prefix that several sequences share
    counts once; for a model that pads, padding counts too. A step runs as many passes as it needs, with the
    same result."""
    warmup_ratio: float = 0.1
    """Fraction of the steps over which the learning rate rises linearly. It then falls to zero along a
    cosine."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradients; larger ones are scaled down to it."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward and backward pass."""
    cpu: bool = False
    """Train on the CPU even if there is an accelerator."""
    seed: int = 0
    """Random seed of the initial weights, the order of the rows and the choice of eval rows."""

    def __post_init__(self) -> None:
        for name in ("sft_epochs", "epochs"):
            self.check(name, lambda value: value >= 0, "0 or more")
        for name in ("batch_size", "micro_batch_tokens", "pretrain_epochs"):
            self.check(name, lambda value: value >= 1, "at least 1")
        for name in ("learning_rate", "sft_learning_rate", "pretrain_learning_rate", "max_grad_norm"):
            self.check(name, lambda value: value > 0 and math.isfinite(value), "a positive number")
        for name in ("weight_decay", "warmup_ratio"):
            self.check(name, lambda value: 0 <= value < 1, "in [0, 1)")
        if self.stage is not None and (
            not self.stage or list(self.stage) != [*filter(self.stage.__contains__, STAGES)]
        ):
            known = ", ".join(STAGES)
            problem = f"--stage should name stages in the order {known}, each once"
            raise ValueError(
                f"{problem}, but it is {' '.join(self.stage) or 'empty'}: put them in this order."
            )
