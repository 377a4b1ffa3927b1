"""What a stage of training does with a micro-batch: supervised training, and preference training.

The loss of each micro-batch is divided by totals of the whole step, so that gradients add up to the same
update however a step is split.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_wrapper.batches import Reduce, SFTBatch, normalize_over_step
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.collate import COLLATE_FNS, collate_sft
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.evaluate import evaluate
from dpo_wrapper.log_probs import FusedLoss
from dpo_wrapper.reference import LogProbCache
from dpo_wrapper.scoring import Scorer

CollateFn = Callable[[Sequence[TokenizedExample]], Any]


class Stage(Protocol):
    """What `Trainer` calls: the module that is trained, and how its loss and metrics are computed.

    In all methods `module` is `self.module`, perhaps wrapped (by DDP), and `reduce` sums a tensor over
    processes.

    Attributes:
        name: identifies the stage in the log and in checkpoints.
        title: label of the progress bar.
        reference_cache: log-probs that the first epoch computes and later ones look up, or None.
    """

    name: str
    title: str
    module: nn.Module
    reference_cache: LogProbCache | None

    @property
    def collate_fn(self) -> CollateFn:
        """The function that makes a batch of examples. It holds no model: workers receive a copy of it."""

    def normalize_over_step(self, batches: Sequence[Any], device: torch.device, reduce: Reduce) -> list[Any]:
        """Attach the step's totals to its micro-batches; `device` is where the module is."""

    def micro_batch_loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, divided by the totals of its step, and its metrics."""

    def end_step(self, reduce: Reduce) -> None:
        """Called after the last micro-batch of each step."""

    def on_step_end(self, step: int) -> None:
        """Called after each step; `step` counts from 1, also in a run that is resumed."""

    def evaluate(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        """Metrics over the batches of all processes."""


class SFTModule(nn.Module):
    """Supervised loss: minus the mean log-prob of the scored tokens, in nats per token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scorer = Scorer(model, share_prefix="auto")

    def forward(self, batch: SFTBatch) -> Tensor:
        """The loss of a batch, divided by the scored tokens of its step."""

        def loss_of_tokens(log_probs: Tensor) -> Tensor:
            return -log_probs.sum() / batch.denominator

        fused_loss = None
        self.scorer.check(batch.sequences)
        if self.training and self.scorer.trains_head:
            fused_loss = FusedLoss(loss_of_tokens, batch.sequences.row)  # sequences do not meet in the loss
        return -self.scorer(batch.sequences, fused_loss=fused_loss).sums.sum() / batch.denominator


class SFTStage:
    """Supervised training: maximum likelihood of prompt and chosen completion, in nats per token."""

    name, title = "sft", "SFT"
    reference_cache: LogProbCache | None = None

    def __init__(self, model: nn.Module) -> None:
        self.module: nn.Module = SFTModule(model)
        self.scorer = self.module.scorer

    @property
    def collate_fn(self) -> CollateFn:
        return partial(collate_sft, tree_options=self.scorer.tree_options)

    def normalize_over_step(
        self, batches: Sequence[SFTBatch], device: torch.device, reduce: Reduce
    ) -> list[SFTBatch]:
        return normalize_over_step(batches, reduce)

    def micro_batch_loss(self, module: nn.Module, batch: SFTBatch) -> tuple[Tensor, dict[str, Tensor]]:
        module.train()
        return module(batch), {}

    def end_step(self, reduce: Reduce) -> None:
        """Nothing is carried from step to step."""

    def on_step_end(self, step: int) -> None:
        """Nothing changes between steps."""

    @torch.no_grad()
    def evaluate(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        module.eval()
        loss = sum(float(module(batch)) for batch in normalize_over_step(batches, reduce))
        return {"loss": float(reduce(torch.tensor(loss, dtype=torch.float64)))}


class DPOStage:
    """Preference training.

    Args:
        sync_steps: number of steps between updates of the reference; 0 never updates it (TR-DPO).
        mixup_alpha: weight of the policy in each update.
    """

    name, title = "dpo", "DPO"

    def __init__(self, dpo: DPO, *, sync_steps: int = 0, mixup_alpha: float = 0.6) -> None:
        self.sync_steps, self.mixup_alpha = sync_steps, mixup_alpha
        self.dpo = dpo
        self.module: nn.Module = dpo
        self.reference_cache = dpo.reference.cache

    @property
    def collate_fn(self) -> CollateFn:
        return partial(COLLATE_FNS[self.dpo.loss.dataset_type], tree_options=self.dpo.policy.tree_options)

    def normalize_over_step(self, batches: Sequence[Any], device: torch.device, reduce: Reduce) -> list[Any]:
        return normalize_over_step(batches, reduce, lambda batch: self.dpo.kl_sums(batch.to(device)))

    def micro_batch_loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return module(batch, return_metrics=True)

    def end_step(self, reduce: Reduce) -> None:
        self.dpo.end_step(reduce)

    def on_step_end(self, step: int) -> None:
        if self.sync_steps and step % self.sync_steps == 0:
            self.dpo.sync_reference(self.mixup_alpha)

    def evaluate(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        return evaluate(module, batches, reduce)
