"""Settings of a training run. The command line is generated from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from dpo_wrapper.data.config import DataConfig
from dpo_wrapper.losses.registry import losses_help
from dpo_wrapper.pretrained import PRESETS

StageName = Literal["pretrain", "sft", "dpo"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""The stages of a run, in their order."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """Train a language model on human preferences: read them from a file, write the model to a folder."""

    out: Path = Path("runs/dpo")
    """Run folder, where the results are written. It must be new or empty, unless --resume is given."""
    eval_data: tuple[Path, ...] | None = None
    """Preferences to evaluate on, as for --data. By default they are taken from --data: the rows whose column
    `split` says test or, if there is no such column, those of a fraction of the prompts."""
    eval_fraction: float = 0.1
    """Fraction of the rows to evaluate on, if no row has a split and --eval-data is not given; 0 for none."""
    ranking: Literal["all", "best"] | None = None
    """Which pairs a loss of pairs makes of a ranked list: all (the default), or the best completion with each
    of the others."""
    model: str = "tiny"
    """tiny, small or medium (a new x-transformers decoder), a run folder, or a Hugging Face model by folder
    or name."""
    loss: Annotated[str, tyro.conf.arg(help=losses_help())] = "sigmoid(beta=0.1) + 1.0*sft"
    reference: Literal["auto", "copy", "none"] = "auto"
    """Reference model: a frozen copy of the policy as it is before preference training, or none. auto makes a
    copy if the loss needs one."""
    reference_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the frozen copy; by default the policy's. bfloat16 takes half the memory of float32."""
    reference_device: str | None = None
    """Device of the frozen copy; by default the policy's. cpu saves an accelerator's memory."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs of all data before training, store them in the run folder, and train
    without a reference in memory. By default the first epoch computes them and keeps them in memory."""
    ref_model_sync_steps: int = 0
    """TR-DPO: number of steps between updates of the reference from the policy; 0 never updates it."""
    ref_model_mixup_alpha: float = 0.6
    """TR-DPO: weight of the policy in each update of the reference; 1 copies the policy."""

    ld_alpha: float = 1.0
    """LD-DPO: weight of the tokens beyond the length of the shorter completion of a pair."""
    wpo: bool = False
    """WPO: weight each pair by the probability of its completions under the policy."""
    router_aux_loss_coef: float | None = None
    """Weight of the loss that balances a mixture's experts (transformers' aux_loss). By default the model's
    own if its configuration has output_router_logits, else 0."""

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
    num_workers: int = 0
    """Number of processes that load batches; 0 loads them in the main process."""
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
    eval_steps: int | None = None
    """Number of steps between evaluations; by default an eighth of all steps."""
    exact_answers: int = 100
    """Number of eval prompts that are answered greedily before and after preference training, to see how many
    answers equal the chosen completion; 0 for none. Answers are compared only where nearly all chosen
    completions have at most 32 tokens."""
    save_steps: int = 200
    """Number of steps between checkpoints; 0 for none but the one that SIGINT or SIGTERM asks for."""
    resume: bool = False
    """Continue an interrupted run in --out, with the settings that it began with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.eval_data, (str, Path)):
            object.__setattr__(self, "eval_data", (Path(self.eval_data),))
        for name in (
            "sft_epochs",
            "epochs",
            "save_steps",
            "num_workers",
            "ref_model_sync_steps",
            "exact_answers",
        ):
            self._check(name, lambda value: value >= 0, "0 or more")
        for name in ("batch_size", "micro_batch_tokens", "eval_steps", "pretrain_epochs"):
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in ("learning_rate", "sft_learning_rate", "pretrain_learning_rate", "max_grad_norm"):
            self._check(name, lambda value: value > 0 and math.isfinite(value), "a positive number")
        self._check("ld_alpha", lambda value: 0 <= value <= 1, "from 0 to 1")
        self._check("router_aux_loss_coef", lambda value: 0 <= value < math.inf, "a number from 0")
        self._check("ref_model_mixup_alpha", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check("max_length", lambda value: value >= 8, "at least 8")
        for name in ("weight_decay", "eval_fraction", "warmup_ratio"):
            self._check(name, lambda value: 0 <= value < 1, "in [0, 1)")
        if self.stage is not None and (
            not self.stage or list(self.stage) != [*filter(self.stage.__contains__, STAGES)]
        ):
            known = ", ".join(STAGES)
            problem = f"--stage should name stages in the order {known}, each once"
            raise ValueError(
                f"{problem}, but it is {' '.join(self.stage) or 'empty'}: put them in this order."
            )
        if set(self.eval_data or ()) & set(self.data):
            raise ValueError(
                "--eval-data should not be the same file as --data: leave it out to evaluate on a part of it."
            )
        if self.precompute_ref_log_probs and self.ref_model_sync_steps:
            raise ValueError(
                "--precompute-ref-log-probs needs a reference that does not change, but "
                "--ref-model-sync-steps updates it: leave one of them out."
            )
        if self.precompute_ref_log_probs and (self.reference_dtype or self.reference_device):
            raise ValueError(
                "--reference-dtype and --reference-device are options of a frozen copy, but "
                "--precompute-ref-log-probs keeps none in memory: leave one of them out."
            )
        if self.ref_model_mixup_alpha != 0.6 and not self.ref_model_sync_steps:
            raise ValueError(
                "--ref-model-mixup-alpha should be given together with --ref-model-sync-steps, but that is "
                "0: give both, or neither."
            )

    def _check(self, name: str, is_valid: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if value is not None and not is_valid(value):
            raise ValueError(f"{flag(name)} should be {expected}, but it is {value}.")

    @property
    def is_new_model(self) -> bool:
        return self.model in PRESETS

    @property
    def peak_sft_learning_rate(self) -> float:
        return self.sft_learning_rate or (2e-3 if self.is_new_model else 1e-5)

    @property
    def peak_pretrain_learning_rate(self) -> float:
        return self.pretrain_learning_rate or self.peak_sft_learning_rate

    @property
    def peak_learning_rate(self) -> float:
        return self.learning_rate or (1e-4 if self.is_new_model else 1e-6)


def flag(field_name: str) -> str:
    """The command line's flag for a field of `TrainConfig`."""
    return f"--{field_name.replace('_', '-')}"
