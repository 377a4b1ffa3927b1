"""Options of the loss and of its reference."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dpo_wrapper.losses.registry import losses_help
from dpo_wrapper.training.options.base import Options


@dataclass(frozen=True, kw_only=True)
class LossOptions(Options):
    """What is minimised, and against which reference."""

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

    def __post_init__(self) -> None:
        self.check("ld_alpha", lambda value: 0 <= value <= 1, "from 0 to 1")
        self.check("router_aux_loss_coef", lambda value: 0 <= value < math.inf, "a number from 0")
        self.check("ref_model_sync_steps", lambda value: value >= 0, "0 or more")
        self.check("ref_model_mixup_alpha", lambda value: 0 < value <= 1, "above 0 and at most 1")
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
