"""What a stage of training does with a micro-batch: supervised warm-up, and preferences.

Every micro-batch gives its share of the step's loss, divided by counts of the whole step, so that gradients
add up to the same update however a step is split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.ranked import RankedBatch, UnpairedBatch
from dpo_wrapper.batches.sequences import PreferenceBatch, ScoredSequences
from dpo_wrapper.data import Entry, TokenList, TokenPair
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.evaluate import as_one_step, evaluate
from dpo_wrapper.losses import unit_of
from dpo_wrapper.prefix_tree import TreeOptions
from dpo_wrapper.reference.cache import Recall
from dpo_wrapper.running import Reduce
from dpo_wrapper.scoring.fused_loss import Foretold
from dpo_wrapper.scoring.scorer import Scorer
from dpo_wrapper.tensor_dataclass import TensorDataclass

Prepare = Callable[[Sequence[Entry]], Any]


class Stage(Protocol):
    """A stage: the module that is trained, and what it makes of a list of entries."""

    name: str
    title: str
    module: nn.Module
    memory: Recall | None
    """What is computed in the first epoch alone."""

    def prepares(self) -> Prepare:
        """What makes a batch of entries. It can be sent to another process, for it holds no model."""

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


@dataclass(frozen=True)
class WrittenBatch(TensorDataclass):
    """Whole sequences, and how many tokens the step scores of which they are a part."""

    sequences: ScoredSequences
    step_tokens: int = 1


def written_batch(plan: TreeOptions | None, entries: Sequence[Entry]) -> WrittenBatch:
    """Prompts and the completions that are wanted, all of them scored."""
    whole = [entry.prompt + (entry.wanted or ()) for entry in entries]
    return WrittenBatch(ScoredSequences.from_lists([()] * len(whole), whole).laid_out(plan))


def ready(sequences: ScoredSequences, plan: TreeOptions | None) -> None:
    """Work out ahead what is needed of sequences while they are on the CPU."""
    sequences.laid_out(plan).names()


def weights_of(entries: Sequence[Entry]) -> Tensor | None:
    """What the rows say of their losses' weights; 1 where only others say something."""
    given = [entry.weight for entry in entries]
    return None if set(given) <= {None} else torch.tensor([1.0 if w is None else w for w in given])


def preference_batch(plan: TreeOptions | None, entries: Sequence[TokenPair]) -> PreferenceBatch:
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


def ranked_batch(plan: TreeOptions | None, entries: Sequence[TokenList]) -> RankedBatch:
    prompts, completions = [entry.prompt for entry in entries], [entry.completions for entry in entries]
    batch = RankedBatch.from_lists(prompts, completions, weights_of(entries))
    ready(batch.sequences, plan)
    return batch


def unpaired_batch(plan: TreeOptions | None, entries: Sequence[TokenList]) -> UnpairedBatch:
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
    """Supervised warm-up: maximum likelihood of prompt and chosen, in nats per token."""

    name, title = "sft", "SFT"
    memory: Recall | None = None

    def __init__(self, model: nn.Module) -> None:
        self.module: nn.Module = LikelihoodLoss(model)
        self.score = self.module.score

    def prepares(self) -> Prepare:
        return partial(written_batch, self.score.tree_plan)

    def as_one_step(
        self, module: nn.Module, batches: Sequence[WrittenBatch], device: torch.device, reduce: Reduce
    ) -> list[WrittenBatch]:
        tokens = sum(int(batch.sequences.length.sum()) for batch in batches)
        total = int(reduce(torch.tensor(tokens, device=device)))
        return [replace(batch, step_tokens=total) for batch in batches]

    def share(self, module: nn.Module, part: WrittenBatch) -> tuple[Tensor, dict[str, Tensor]]:
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
        return partial(BATCHES[unit_of(self.dpo.losses)], self.score.tree_plan)

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
