"""Options of the stages of a run and of their optimizer."""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import tyro

from dpo_wrapper.training.options.base import Options, flag

StageName = Literal["pretrain", "sft", "dpo"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""The stages of a run, in their order."""

LearningRateSchedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial",
    "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
"""Schedules of the learning rate, by the names in transformers."""


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
    """Epochs of supervised training. By default 5 for a new model; for others 1 if there is data for it or
    --stage asks for it, else 0."""
    sft_learning_rate: float | None = None
    """Peak learning rate of supervised training; by default 2e-3 for a new model, 2e-4 for an
    adapter and 1e-5 for others."""
    train_on_prompt: bool | None = None
    """Whether supervised training learns the prompts of preferences as well as their best completions. By
    default it does for a new model that has not been pretrained."""
    epochs: int = 3
    """Epochs of preference training; 0 leaves the stage out."""
    learning_rate: Annotated[float | None, tyro.conf.arg(aliases=["--lr"])] = None
    """Peak learning rate of preference training. By default 1e-4 for a new model, 1e-6 for other models, and
    for an adapter 5e-4 for up to 20 steps and less for more, with the square root of their number: 1.6e-4 for
    200, 5e-5 from 2,000 on."""
    batch_size: int = 16
    """Pairs (lists, rows) per optimizer step, over all processes."""
    micro_batch_tokens: int = 16384
    """Maximum number of tokens per forward pass: what fits in memory. A prefix that several sequences share
    counts once; for a model that pads, padding counts too. A step runs as many passes as it needs, with the
    same result."""
    max_steps: int | None = None
    """Maximum number of optimizer steps of each stage, whatever its epochs; the learning rate changes over
    them."""
    optimizer: str = "adamw"
    """adamw (fused where torch has it), or the dotted name of an optimizer's class: torch.optim.SGD,
    bitsandbytes.optim.AdamW8bit."""
    optimizer_args: str | None = None
    """JSON of the optimizer's other arguments: '{"betas": [0.9, 0.95], "eps": 1e-6}'."""
    lr_scheduler: LearningRateSchedule = "cosine"
    """How the learning rate changes after its rise, by transformers' names. constant has no rise."""
    lr_scheduler_args: str | None = None
    """JSON of the schedule's arguments: '{"min_lr_rate": 0.1}' for cosine_with_min_lr."""
    warmup_ratio: float = 0.1
    """Fraction of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of all weights but biases and norms; decoupled in AdamW."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradients; larger ones are scaled down to it."""
    on_nan: Literal["stop", "skip"] = "stop"
    """Where the loss or the norm of the gradients is not finite: stop, or skip the step, which then changes
    nothing. Ten such steps in a row stop the run all the same."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision of the forward and backward pass; fp16, which scales the loss, needs CUDA."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer states over the processes that torchrun has started (FSDP2).
    Under accelerate launch its configuration says so."""
    cpu: bool = False
    """Train on the CPU even if there is an accelerator."""
    seed: int = 0
    """Random seed of the initial weights, the order of the rows and, without --split-seed, the choice of eval
    rows."""

    def __post_init__(self) -> None:
        for name in ("sft_epochs", "epochs"):
            self.check(name, lambda value: value >= 0, "0 or more")
        for name in ("batch_size", "micro_batch_tokens", "pretrain_epochs", "max_steps"):
            self.check(name, lambda value: value >= 1, "at least 1")
        for name in ("learning_rate", "sft_learning_rate", "pretrain_learning_rate", "max_grad_norm"):
            self.check(name, lambda value: value > 0 and math.isfinite(value), "a positive number")
        for name in ("weight_decay", "warmup_ratio"):
            self.check(name, lambda value: 0 <= value < 1, "in [0, 1)")
        self.check("seed", lambda value: 0 <= value < 2**32, "from 0 to 4,294,967,295")
        for name in ("optimizer_args", "lr_scheduler_args"):
            self.check(name, is_json_object, "the JSON of an object")
        for key, own in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
            if key in json.loads(self.optimizer_args or "{}"):
                raise ValueError(f"--optimizer-args should not hold {key}, but it does: give {flag(own)}.")
        if self.lr_scheduler == "constant" and self.warmup_ratio not in (0, 0.1):
            raise ValueError(
                f"--warmup-ratio should be left out where --lr-scheduler constant has no warm-up, but it is "
                f"{self.warmup_ratio}: give --lr-scheduler constant_with_warmup."
            )
        if self.lr_scheduler.startswith("constant") and self.lr_scheduler_args is not None:
            raise ValueError(
                f"--lr-scheduler-args should be given to a schedule that has arguments, but "
                f"{self.lr_scheduler} has none: leave it out."
            )
        if self.stage is not None and (
            not self.stage or list(self.stage) != [*filter(self.stage.__contains__, STAGES)]
        ):
            known = ", ".join(STAGES)
            problem = f"--stage should name stages in the order {known}, each once"
            raise ValueError(
                f"{problem}, but it is {' '.join(self.stage) or 'empty'}: put them in this order."
            )


def is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
