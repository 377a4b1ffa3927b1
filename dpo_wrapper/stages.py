"""What a stage of training does with a micro-batch: supervised warm-up, and preferences.

Every micro-batch gives its share of the step's loss, divided by counts of the whole step, so that gradients
add up to the same update however a step is split.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_wrapper.data import PreferenceCollator, PreferenceItem, PreferenceItemWithColumns
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluate import evaluate
from dpo_wrapper.recall import Recall
from dpo_wrapper.scoring import Scorer
from dpo_wrapper.sequences import PreferenceBatch, ScoredSequences, TreePlan

Reduce = Callable[[Tensor], Tensor]
Totals = tuple[int, ...]
Item = PreferenceItem | PreferenceItemWithColumns
Prepare = Callable[[Sequence[Item]], Any]


class Stage(Protocol):
    """A stage: the module that is trained, and what it makes of a list of items."""

    name: str
    title: str
    module: nn.Module
    memory: Recall | None
    """What is computed in the first epoch alone."""

    def prepares(self) -> Prepare:
        """What makes a batch of items. It can be sent to another process, for it holds no model."""

    def counts(self, batch: Any) -> Totals:
        """Pairs, scored tokens and perhaps more; summed over a step they are what `share` divides by."""

    def share(self, module: nn.Module, batch: Any, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's part of the step's loss, and metrics. `module` is `self.module`, perhaps wrapped."""

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
        return -self.score(sequences).sum() / max(1, tokens)


def chosen_sequences(
    collate: PreferenceCollator, plan: TreePlan | None, items: Sequence[Item]
) -> ScoredSequences:
    """Prompts and chosen completions, all of them scored."""
    columns = collate(items)
    real, _ = columns["seq_mask"]
    return ScoredSequences.from_padded(columns["preferred_seq"], real, real).laid_out(plan)


def preference_batch(
    collate: PreferenceCollator, plan: TreePlan | None, items: Sequence[Item]
) -> PreferenceBatch:
    columns = collate(items)
    seqs = (columns["preferred_seq"], columns["unpreferred_seq"])
    more = (columns.get("pair_weights"), columns.get("margins"))
    batch = PreferenceBatch.from_padded(seqs, columns["prompt_mask"], columns["seq_mask"], *more)
    batch.sequences.laid_out(plan).names()
    return batch


class SFTStage:
    """Supervised warm-up: maximum likelihood of prompt and chosen, in nats per token."""

    name, title = "sft", "SFT"
    memory: Recall | None = None

    def __init__(self, model: nn.Module, collate: PreferenceCollator) -> None:
        self.module: nn.Module = LikelihoodLoss(model)
        self.score = self.module.score
        self.collate = collate

    def prepares(self) -> Prepare:
        return partial(chosen_sequences, self.collate, self.score.tree_plan)

    def counts(self, batch: ScoredSequences) -> Totals:
        return len(batch.length), int(batch.length.sum())

    def share(
        self, module: nn.Module, batch: ScoredSequences, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        module.train()
        return module(batch, totals[1]), {}

    def end_step(self, reduce: Reduce) -> None:
        """Nothing runs over steps."""

    def after(self, step: int) -> None:
        """Nothing changes between steps."""

    @torch.no_grad()
    def held_out(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        module.eval()
        tokens = sum(self.counts(batch)[1] for batch in batches)
        losses = [float(module(batch, 1)) for batch in batches]
        total, count = reduce(torch.tensor([sum(losses), tokens], dtype=torch.float64)).tolist()
        return {"loss": total / max(1.0, count)}


class DPOStage:
    """Preference training, with the reference moved by `sync_alpha` every so many steps (0 for never)."""

    name, title = "dpo", "DPO"

    def __init__(
        self, dpo: DPO, collate: PreferenceCollator, *, sync_every: int = 0, sync_alpha: float = 0.6
    ) -> None:
        self.sync_every, self.sync_alpha = sync_every, sync_alpha
        self.dpo = dpo
        self.module: nn.Module = dpo
        self.score = dpo.score_policy
        self.memory = dpo.reference.memory
        self.collate = collate

    def prepares(self) -> Prepare:
        return partial(preference_batch, self.collate, self.score.tree_plan)

    def counts(self, batch: PreferenceBatch) -> Totals:
        return *batch.counts(), batch.whole_tokens()

    def share(
        self, module: nn.Module, batch: PreferenceBatch, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return module(batch.as_part_of(*totals), return_metrics=True)

    def end_step(self, reduce: Reduce) -> None:
        self.dpo.end_step(reduce)

    def after(self, step: int) -> None:
        if self.sync_every and step % self.sync_every == 0:
            self.dpo.sync_reference(self.sync_alpha)

    def held_out(self, module: nn.Module, batches: Sequence[Any], reduce: Reduce) -> dict[str, float]:
        return evaluate(module, batches, reduce)
