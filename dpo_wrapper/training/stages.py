"""The two stages of training: supervised training and preference training.

A step may have several micro-batches, in several processes. The loss of each is divided by totals of the
whole step, so that the gradients add up to those of the step as one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.ranked import RankedBatch, UnpairedBatch
from dpo_wrapper.batches.sequences import PreferenceBatch, ScoredSequences, TreePlan
from dpo_wrapper.data import Entry, TokenList, TokenPair
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.evaluate import evaluate, normalize_over_step
from dpo_wrapper.losses import unit_of
from dpo_wrapper.reference.cache import Recall
from dpo_wrapper.running import Reduce
from dpo_wrapper.scoring.fused_loss import Foretold
from dpo_wrapper.scoring.scorer import Scorer
from dpo_wrapper.tensor_dataclass import Movable

CollateFn = Callable[[Sequence[Entry]], Any]


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
    reference_cache: Recall | None

    @property
    def collate_fn(self) -> CollateFn:
        """The function that makes a batch of examples. It holds no model: workers receive a copy of it."""

    def normalize_over_step(
        self, module: nn.Module, batches: Sequence[Any], device: torch.device, reduce: Reduce
    ) -> list[Any]:
        """Attach the step's totals to its micro-batches."""

    def micro_batch_loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, divided by the totals of its step, and its metrics."""

    def end_step(self, reduce: Reduce) -> None:
        """Called after the last micro-batch of each step."""

    def on_step_end(self, step: int) -> None:
        """Called after each step; `step` counts from 1, also in a run that is resumed."""

    def evaluate(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        """Metrics over the batches of all processes."""


class SFTModule(nn.Module):
    """Supervised loss: minus the summed log-probs of sequences, divided by `tokens`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.score = Scorer(model, share="auto")

    def forward(self, sequences: ScoredSequences, tokens: int) -> Tensor:
        """The loss in nats per token.

        Args:
            tokens: number of scored tokens of the whole step.
        """

        def loss(log_probs: Tensor) -> Tensor:
            return -log_probs.sum() / max(1, tokens)

        no_links = sequences.row.new_zeros(0, 2)  # the loss is a sum over sequences, which do not interact
        return loss(self.score(sequences, Foretold(loss, no_links) if self.training else None))


@dataclass(frozen=True)
class WrittenBatch(Movable):
    """Whole sequences, and how many tokens the step scores of which they are a part."""

    sequences: ScoredSequences
    step_tokens: int = 1


def written_batch(plan: TreePlan | None, entries: Sequence[Entry]) -> WrittenBatch:
    """Prompts and the completions that are wanted, all of them scored."""
    whole = [entry.prompt + (entry.wanted or ()) for entry in entries]
    return WrittenBatch(ScoredSequences.from_lists([()] * len(whole), whole).laid_out(plan))


def ready(sequences: ScoredSequences, plan: TreePlan | None) -> None:
    """Work out ahead what is needed of sequences while they are on the CPU."""
    sequences.laid_out(plan).names()


def weights_of(entries: Sequence[Entry]) -> Tensor | None:
    """What the rows say of their losses' weights; 1 where only others say something."""
    given = [entry.weight for entry in entries]
    return None if set(given) <= {None} else torch.tensor([1.0 if w is None else w for w in given])


def preference_batch(plan: TreePlan | None, entries: Sequence[TokenPair]) -> PreferenceBatch:
    margins = [entry.margin for entry in entries]
    batch = PreferenceBatch.from_lists(
        [entry.prompt for entry in entries],
        [entry.chosen for entry in entries],
        [entry.rejected for entry in entries],
        pair_weights=weights_of(entries),
        margins=None if set(margins) <= {None} else torch.tensor([margin or 0.0 for margin in margins]),
    )
    ready(batch.sequences, plan)
    return batch


def ranked_batch(plan: TreePlan | None, entries: Sequence[TokenList]) -> RankedBatch:
    prompts, completions = [entry.prompt for entry in entries], [entry.completions for entry in entries]
    batch = RankedBatch.from_lists(prompts, completions, weights_of(entries))
    ready(batch.sequences, plan)
    return batch


def unpaired_batch(plan: TreePlan | None, entries: Sequence[TokenList]) -> UnpairedBatch:
    batch = UnpairedBatch.from_lists(
        [entry.prompt for entry in entries],
        [entry.completions[0] for entry in entries],
        [bool(entry.label) for entry in entries],
        [entry.mismatched for entry in entries],
        weights_of(entries),
    )
    ready(batch.sequences, plan)
    ready(batch.mismatched.sequences, plan)
    return batch


BATCHES: dict[str, Callable[..., Any]] = {
    "pairs": preference_batch,
    "lists": ranked_batch,
    "rows": unpaired_batch,
}


class SFTStage:
    """Supervised training: maximum likelihood of prompt and chosen completion, in nats per token."""

    name, title = "sft", "SFT"
    reference_cache: Recall | None = None

    def __init__(self, model: nn.Module) -> None:
        self.module: nn.Module = SFTModule(model)
        self.score = self.module.score

    @property
    def collate_fn(self) -> CollateFn:
        return partial(written_batch, self.score.tree_plan)

    def normalize_over_step(
        self, module: nn.Module, batches: Sequence[WrittenBatch], device: torch.device, reduce: Reduce
    ) -> list[WrittenBatch]:
        tokens = sum(int(batch.sequences.length.sum()) for batch in batches)
        step_tokens = int(reduce(torch.tensor(tokens, device=device)))
        return [replace(batch, step_tokens=step_tokens) for batch in batches]

    def micro_batch_loss(self, module: nn.Module, batch: WrittenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        module.train()
        return module(batch.sequences, batch.step_tokens), {}

    def end_step(self, reduce: Reduce) -> None:
        """Nothing is carried from step to step."""

    def on_step_end(self, step: int) -> None:
        """Nothing changes between steps."""

    @torch.no_grad()
    def evaluate(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        module.eval()
        device = batches[0].sequences.ids.device
        normalized = self.normalize_over_step(module, batches, device, reduce)
        loss = sum(float(module(batch.sequences, batch.step_tokens)) for batch in normalized)
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
        self.score = dpo.score_policy
        self.reference_cache = dpo.reference.memory

    @property
    def collate_fn(self) -> CollateFn:
        return partial(BATCHES[unit_of(self.dpo.losses)], self.score.tree_plan)

    def normalize_over_step(
        self, module: nn.Module, batches: Sequence[Any], device: torch.device, reduce: Reduce
    ) -> list[Any]:
        return normalize_over_step(module, batches, device, reduce)

    def micro_batch_loss(self, module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return module(batch, return_metrics=True)

    def end_step(self, reduce: Reduce) -> None:
        self.dpo.end_step(reduce)

    def on_step_end(self, step: int) -> None:
        if self.sync_steps and step % self.sync_steps == 0:
            self.dpo.sync_reference(self.mixup_alpha)

    def evaluate(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        return evaluate(module, batches, reduce)
