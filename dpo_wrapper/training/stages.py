"""What a stage of training does with a micro-batch: supervised warm-up, and preferences.

Every micro-batch gives its share of the step's loss, divided by counts of the whole step, so that gradients
add up to the same update however a step is split.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.batches.sft import SFTBatch
from dpo_wrapper.data.collate import COLLATE_FNS, collate_sft
from dpo_wrapper.data.examples import DatasetType, TokenizedExample
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.evaluate import as_one_step, evaluate
from dpo_wrapper.losses import unit_of
from dpo_wrapper.reference.cache import Recall
from dpo_wrapper.running import Reduce
from dpo_wrapper.scoring.fused_loss import Foretold
from dpo_wrapper.scoring.scorer import Scorer

Prepare = Callable[[Sequence[TokenizedExample]], Any]


class Stage(Protocol):
    """A stage: the module that is trained, and what it makes of a list of examples."""

    name: str
    title: str
    module: nn.Module
    memory: Recall | None
    """What is computed in the first epoch alone."""

    def prepares(self) -> Prepare:
        """What makes a batch of examples. It can be sent to another process, for it holds no model."""

    def as_one_step(
        self, module: nn.Module, batches: Sequence[Any], device: torch.device, reduce: Reduce
    ) -> list[Any]:
        """The batches as parts of one step, over all processes, whose sums `reduce` gives.

        `module` is `self.module`, perhaps wrapped.
        """

    def share(self, module: nn.Module, part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """This part's share of the step's loss, and metrics."""

    def end_step(self, reduce: Reduce) -> None:
        """Called after the last share of each step; `reduce` sums over processes."""

    def after(self, step: int) -> None:
        """Called after so many steps, of this run and those that it goes on from."""

    def held_out(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        """Metrics over held-out batches, of which other processes have others."""


class LikelihoodLoss(nn.Module):
    """Minus the summed log-prob of sequences, divided by `tokens`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.score = Scorer(model, share="auto")

    def forward(self, sequences: ScoredSequences, tokens: int) -> Tensor:
        def loss(scores: Tensor) -> Tensor:
            return -scores.sum() / max(1, tokens)

        apart = sequences.row.new_zeros(0, 2)  # no sequence's share of a sum depends on the others
        return loss(self.score(sequences, Foretold(loss, apart) if self.training else None))


DATASET_TYPES: dict[str, DatasetType] = {
    "pairs": "preference",
    "lists": "ranked",
    "rows": "unpaired_preference",
}
"""What data a loss learns from, by what its examples are counted in."""


class SFTStage:
    """Supervised warm-up: maximum likelihood of prompt and chosen, in nats per token."""

    name, title = "sft", "SFT"
    memory: Recall | None = None

    def __init__(self, model: nn.Module) -> None:
        self.module: nn.Module = LikelihoodLoss(model)
        self.score = self.module.score

    def prepares(self) -> Prepare:
        return partial(collate_sft, tree_options=self.score.tree_plan)

    def as_one_step(
        self, module: nn.Module, batches: Sequence[SFTBatch], device: torch.device, reduce: Reduce
    ) -> list[SFTBatch]:
        tokens = sum(int(batch.sequences.length.sum()) for batch in batches)
        total = int(reduce(torch.tensor(tokens, device=device)))
        return [replace(batch, step_tokens=total) for batch in batches]

    def share(self, module: nn.Module, part: SFTBatch) -> tuple[Tensor, dict[str, Tensor]]:
        module.train()
        return module(part.sequences, part.step_tokens), {}

    def end_step(self, reduce: Reduce) -> None:
        """Nothing runs over steps."""

    def after(self, step: int) -> None:
        """Nothing changes between steps."""

    @torch.no_grad()
    def held_out(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        module.eval()
        device = batches[0].sequences.ids.device
        parts = self.as_one_step(module, batches, device, reduce)
        loss = sum(float(module(part.sequences, part.step_tokens)) for part in parts)
        return {"loss": float(reduce(torch.tensor(loss, dtype=torch.float64)))}


class DPOStage:
    """Preference training, with the reference moved by `sync_alpha` every so many steps (0 for never)."""

    name, title = "dpo", "DPO"

    def __init__(self, dpo: DPO, *, sync_every: int = 0, sync_alpha: float = 0.6) -> None:
        self.sync_every, self.sync_alpha = sync_every, sync_alpha
        self.dpo = dpo
        self.module: nn.Module = dpo
        self.score = dpo.score_policy
        self.memory = dpo.reference.memory

    def prepares(self) -> Prepare:
        return partial(
            COLLATE_FNS[DATASET_TYPES[unit_of(self.dpo.losses)]], tree_options=self.score.tree_plan
        )

    def as_one_step(
        self, module: nn.Module, batches: Sequence[Any], device: torch.device, reduce: Reduce
    ) -> list[Any]:
        return as_one_step(module, batches, device, reduce)

    def share(self, module: nn.Module, part: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return module(part, return_metrics=True)

    def end_step(self, reduce: Reduce) -> None:
        self.dpo.end_step(reduce)

    def after(self, step: int) -> None:
        if self.sync_every and step % self.sync_every == 0:
            self.dpo.sync_reference(self.sync_alpha)

    def held_out(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        return evaluate(module, batches, reduce)
