"""What a stage of training does with a micro-batch: supervised training, and preference training.

The loss of each micro-batch is divided by totals of the whole step, so that gradients add up to the same
update however a step is split.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.batches import Reduce, SFTBatch, normalize_over_step
from dpo_wrapper.data.collate import COLLATE_FNS, collate_sft
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.evaluate import evaluate
from dpo_wrapper.evaluation.exact_answers import ExactAnswers
from dpo_wrapper.log_probs import FusedLoss
from dpo_wrapper.metrics import count_tokens
from dpo_wrapper.models.eval_mode import eval_mode
from dpo_wrapper.reference import LogProbCache
from dpo_wrapper.scoring import Scorer, SharePrefix
from dpo_wrapper.training.config import StageName, TrainConfig
from dpo_wrapper.training.micro_batches import CollateFn
from dpo_wrapper.training.stage_plan import StagePlan

ProgressCallback = Callable[[int], object]


def ignore_progress(_: int) -> None:
    """What is called after each batch where nobody looks."""


class Stage(ABC):
    """What `Trainer` calls: the module that is trained, and how its loss and metrics are computed.

    In all methods `module` is `self.module`, perhaps wrapped (by DDP), and `reduce` sums over processes.

    Attributes:
        name: identifies the stage in the log and in checkpoints.
        scorer: computes the log-probs of the model that is trained.
        epochs, num_steps, learning_rate: as in `StagePlan`.
        reference_cache: log-probs that the first epoch computes and later ones look up, or None.
        has_reference: whether the model is compared with what it was before the first step.
        reference_changes: whether the reference moves while the stage runs.
        exact_answers: what the model is asked before and after training, or None.
    """

    module: nn.Module
    scorer: Scorer
    reference_cache: LogProbCache | None = None
    has_reference = False
    reference_changes = False
    exact_answers: ExactAnswers | None = None

    def __init__(self, plan: StagePlan) -> None:
        self.name: StageName = plan.name
        self.epochs, self.num_steps, self.learning_rate = plan.epochs, plan.num_steps, plan.learning_rate

    @property
    @abstractmethod
    def collate_fn(self) -> CollateFn:
        """The function that makes a batch of examples. It holds no model: workers receive a copy of it."""

    def normalize_over_step(self, batches: list[Any], reduce: Reduce | None) -> list[Any]:
        """Attach the step's totals to its micro-batches."""
        return normalize_over_step(batches, reduce)

    @abstractmethod
    def micro_batch_loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, divided by the totals of its step, and its metrics."""

    def end_step(self, step: int, reduce: Reduce) -> None:  # noqa: B027
        """Called after each update of the weights; `step` counts from 1, also in a run that is resumed."""

    def discard_step(self) -> None:  # noqa: B027
        """Called in place of `end_step` where the weights were not updated."""

    @abstractmethod
    def evaluate(
        self,
        module: nn.Module,
        batches: list[Any],
        reduce: Reduce | None,
        progress: ProgressCallback = ignore_progress,
    ) -> dict[str, float]:
        """Metrics over the batches of all processes; `progress` is called with 1 after each batch."""

    @property
    def model(self) -> nn.Module:
        """The language model that is trained."""
        return self.scorer.language_model.model

    def reference_model(self) -> AbstractContextManager[nn.Module | None]:
        """The context in which a language model is the reference; None where there is no model of it."""
        return nullcontext()


class SFTModule(nn.Module):
    """Supervised loss: minus the mean log-prob of the scored tokens, in nats per token.

    `router_aux_loss_coef` and `share_prefix` are those of `DPO`.
    """

    def __init__(
        self,
        model: nn.Module,
        router_aux_loss_coef: float | None = None,
        share_prefix: SharePrefix = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.scorer = Scorer(
            model, share_prefix=share_prefix, is_eval=False, router_aux_loss_coef=router_aux_loss_coef
        )

    def forward(self, batch: SFTBatch) -> Tensor:
        """The loss of a batch, divided by the scored tokens of its step.

        In training it is with the loss that balances experts, for the batch's share of the step's tokens.
        """

        def loss_of_tokens(log_probs: Tensor) -> Tensor:
            return -log_probs.sum() / batch.denominator

        self.scorer.check(batch.sequences)
        fused_loss = None
        if self.training and self.scorer.trains_head:
            # tokens do not meet in the loss: each is a group of its own, also where sequences share a prefix
            groups = torch.arange(len(batch.sequences.row), device="cpu")  # which waits for no device
            fused_loss = FusedLoss(loss_of_tokens, groups)
        log_probs = self.scorer(batch.sequences, fused_loss=fused_loss)
        return self.scorer.add_aux_loss(loss_of_tokens(log_probs.sums), log_probs, batch)


class SFTStage(Stage):
    """Training on documents or completions: maximum likelihood, in nats per scored token."""

    def __init__(self, plan: StagePlan, model: nn.Module, config: TrainConfig) -> None:
        super().__init__(plan)
        self.module = SFTModule(model, config.router_aux_loss_coef, config.prefix_sharing)
        self.scorer = self.module.scorer

    @property
    def collate_fn(self) -> CollateFn:
        return partial(collate_sft, tree_options=self.scorer.tree_options)

    def micro_batch_loss(self, module: nn.Module, batch: SFTBatch) -> tuple[Tensor, dict[str, Tensor]]:
        module.train()
        loss, sequences = module(batch), batch.sequences
        num_scored = loss.new_full((), len(sequences.row))
        return loss, {"tokens/scored": num_scored} | count_tokens(sequences, loss)

    @torch.no_grad()
    def evaluate(
        self,
        module: nn.Module,
        batches: list[Any],
        reduce: Reduce | None,
        progress: ProgressCallback = ignore_progress,
    ) -> dict[str, float]:
        module.eval()
        loss = 0.0
        for batch in self.normalize_over_step(batches, reduce):
            loss += float(module(batch))
            progress(1)
        total = torch.tensor(loss, dtype=torch.float64)
        return {"loss": float(total if reduce is None else reduce(total))}


class DPOStage(Stage):
    """Preference training. The reference may follow the policy (TR-DPO)."""

    def __init__(self, plan: StagePlan, dpo: DPO, config: TrainConfig) -> None:
        super().__init__(plan)
        self.sync_steps, self.mixup_alpha = config.ref_model_sync_steps, config.ref_model_mixup_alpha
        self.has_dropout = config.lora_dropout > 0
        self.dpo = self.module = dpo
        self.scorer = dpo.policy
        self.reference_cache = dpo.reference.cache
        self.has_reference, self.reference_changes = True, bool(self.sync_steps)

    @property
    def collate_fn(self) -> CollateFn:
        dataset_type: Any = self.dpo.loss.dataset_type
        return partial(COLLATE_FNS[dataset_type], tree_options=self.scorer.tree_options)

    def normalize_over_step(self, batches: list[Any], reduce: Reduce | None) -> list[Any]:
        return self.dpo.normalize_over_step(batches, reduce)

    def micro_batch_loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self.has_dropout:
            self.dpo.policy_model.train()
        return module(batch, return_metrics=True)

    def end_step(self, step: int, reduce: Reduce) -> None:
        self.dpo.end_step(reduce)
        if self.sync_steps and step % self.sync_steps == 0:
            self.dpo.sync_reference(self.mixup_alpha)

    def discard_step(self) -> None:
        self.dpo.loss.discard_step()

    def evaluate(
        self,
        module: nn.Module,
        batches: list[Any],
        reduce: Reduce | None,
        progress: ProgressCallback = ignore_progress,
    ) -> dict[str, float]:
        with eval_mode(self.dpo.policy_model) if self.has_dropout else nullcontext():
            return evaluate(module, batches, reduce, progress)

    def reference_model(self) -> AbstractContextManager[nn.Module | None]:
        return self.dpo.reference_model()
