"""Metrics of a batch, under the names that logs, reports and other tools use.

docs/evaluation.md lists them. Log-probs and rewards are in nats and are means over the valid pairs (lists,
rows); what they are for ranked lists and for rows with a label stands there too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.losses.base import Loss
from dpo_wrapper.losses.inputs import PairLogProbs, RankedLogProbs, UnpairedLogProbs

VALID_COUNTS = ("pairs/valid", "lists/valid", "rows/valid", "tokens/scored")
SIDE_COUNTS = ("rows/chosen", "rows/rejected")
COUNTS = (*VALID_COUNTS, *SIDE_COUNTS, "tokens/unique", "tokens/padded")
"""Metrics that add up over batches; all others are means over what one of these counts."""

LAYER_EPSILONS, SUM_EPSILONS = 3, 100
"""Rounding of a token's log-prob, relative to it, in machine epsilons of layers' results and of sums."""

Metrics = dict[str, Tensor]
LogProbs = PairLogProbs | RankedLogProbs | UnpairedLogProbs


@torch.no_grad()
def batch_metrics(
    batch: Batch,
    log_probs: LogProbs,
    losses: Float[Tensor, "_"],
    loss: Loss | None,
    dtype: torch.dtype = torch.float64,
    aux_loss: Float[Tensor, ""] | None = None,
) -> Metrics:
    """The metrics of one batch, as detached scalars; means are 0 where nothing is valid.

    Args:
        batch: the batch.
        log_probs: what `batch.log_probs` gives.
        losses: one value per pair (list, row).
        loss: whose rewards are reported; None where there are none.
        dtype: the narrowest that the log-probs were computed in, if narrower than their own.
        aux_loss: the loss that balances experts, where it is computed.
    """
    if isinstance(log_probs, PairLogProbs):
        valid, metrics = "pairs/valid", pair_metrics(log_probs, loss, dtype)
    elif isinstance(log_probs, RankedLogProbs):
        valid, metrics = "lists/valid", ranked_metrics(log_probs, loss, dtype)
    else:
        valid, metrics = "rows/valid", unpaired_metrics(log_probs, loss, dtype)
    sizes = {valid: losses.new_full((), len(losses))} | count_tokens(batch.sequences, losses)
    aux_metrics = {} if aux_loss is None else {"aux_loss": aux_loss.detach().to(losses)}
    return {"loss": mean(losses)} | aux_metrics | metrics | sizes


def count_tokens(sequences: ScoredSequences, like: Tensor) -> Metrics:
    """What a batch's sequences cost, as counts of the dtype and device of another tensor."""
    counts = {"tokens/unique": sequences.unique_tokens(), "tokens/padded": sequences.ids.numel()}
    return {name: like.new_full((), count) for name, count in counts.items()}


def pair_metrics(pairs: PairLogProbs, loss: Loss | None, dtype: torch.dtype) -> Metrics:
    values = {}
    if loss is not None:
        chosen = Rewards.compute(loss, pairs.chosen, pairs.ref_chosen, pairs.chosen_length, dtype)
        rejected = Rewards.compute(loss, pairs.rejected, pairs.ref_rejected, pairs.rejected_length, dtype)
        values = {
            "rewards/chosen": chosen.values,
            "rewards/rejected": rejected.values,
            "rewards/margins": chosen.values - rejected.values,
            "rewards/accuracies": chosen.is_ahead_of(rejected),
        }
    values |= {
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "length/chosen": pairs.chosen_length.to(pairs.chosen.dtype),
        "length/rejected": pairs.rejected_length.to(pairs.chosen.dtype),
    }
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        values["logps/ref_chosen"] = pairs.ref_chosen
        values["logps/ref_rejected"] = pairs.ref_rejected
        values["kl/chosen"] = pairs.chosen_logratio
    return {name: mean(value) for name, value in values.items()}


def ranked_metrics(lists: RankedLogProbs, loss: Loss | None, dtype: torch.dtype) -> Metrics:
    is_real, rewards = lists.is_real, None
    if loss is not None:
        rewards = Rewards.compute(loss, lists.policy, lists.reference, lists.length, dtype)
    rank = torch.arange(is_real.shape[1], device=is_real.device)
    is_best = rank == is_real.int().argmax(dim=-1, keepdim=True)  # the first with a scored token
    sides = (is_best, is_real & ~is_best)
    values = side_metrics(
        lambda table: [table.where(side, 0.0).sum(dim=-1) / side.sum(dim=-1) for side in sides],
        lists,
        rewards,
    )
    if rewards is not None:
        is_pair = is_real[:, :, None] & is_real[:, None, :] & (rank[:, None] < rank)
        is_right = rewards[:, :, None].is_ahead_of(rewards[:, None, :]).where(is_pair, 0.0)
        values["rewards/accuracies"] = is_right.sum(dim=(1, 2)) / is_pair.sum(dim=(1, 2))
    return {name: mean(value) for name, value in values.items()}


def unpaired_metrics(rows: UnpairedLogProbs, loss: Loss | None, dtype: torch.dtype) -> Metrics:
    """Metrics of rows with a label; the means of a side are 0 where it has no row."""
    sides = (rows.label, ~rows.label)
    metrics = {"kl": rows.kl.detach()}
    rewards = None
    if loss is not None:
        rewards = Rewards.compute(loss, rows.policy, rows.reference, rows.length, dtype)
        # the reward of a completion whose log-ratio is the KL estimate, which is rounded as rows are
        kl = rows.kl.clamp(min=0).expand_as(rows.policy)
        length = torch.ones_like(rows.label, dtype=torch.long)
        threshold = Rewards(loss.reward(kl, None, length), mean(rewards.rounding))
        is_above = rewards.is_ahead_of(threshold)
        metrics["rewards/accuracies"] = mean(is_above.where(rows.label, 1 - is_above))
    return {
        **metrics,
        **side_metrics(lambda values: [mean_of_side(values, side) for side in sides], rows, rewards),
        **{name: side.sum().to(rows.policy.dtype) for name, side in zip(SIDE_COUNTS, sides, strict=True)},
    }


def side_metrics(
    split_sides: Callable[[Tensor], list[Tensor]],
    log_probs: RankedLogProbs | UnpairedLogProbs,
    rewards: "Rewards | None",
) -> Metrics:
    """Rewards, log-probs and lengths of the two sides that `split_sides` makes of all values."""
    tables = {"logps/": log_probs.policy}
    if rewards is not None:
        tables["rewards/"] = rewards.values
    if log_probs.length is not None:
        tables["length/"] = log_probs.length.to(log_probs.policy.dtype)
    if log_probs.reference is not None:
        tables["logps/ref_"] = log_probs.reference
    metrics = {
        name + side: values
        for name, table in tables.items()
        for side, values in zip(("chosen", "rejected"), split_sides(table), strict=True)
    }
    if rewards is not None:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if log_probs.reference is not None:
        metrics["kl/chosen"] = split_sides(log_probs.logratio)[0]
    return metrics


@dataclass(frozen=True)
class Rewards:
    """Rewards of completions, and how far each may be off because its log-probs are rounded."""

    values: Tensor
    rounding: Tensor

    @classmethod
    def compute(
        cls,
        loss: Loss,
        policy: Tensor,
        reference: Tensor | None,
        length: Tensor | None,
        dtype: torch.dtype,
    ) -> "Rewards":
        """The rewards by which a loss compares completions; arguments as in `Loss.reward`.

        The log-probs of n tokens are off by `ε|p| / √n` together: each token's by ε of itself, and errors of
        either sign add up like steps of a random walk. The results of layers are rounded to `dtype`, and
        products are summed in the dtype of `policy`; `ε` is so many times the machine epsilons of both.
        """
        length = torch.ones_like(policy, dtype=torch.long) if length is None else length
        values = loss.reward(policy, reference, length)
        epsilon = LAYER_EPSILONS * torch.finfo(dtype).eps + SUM_EPSILONS * torch.finfo(policy.dtype).eps
        if reference is None or not loss.needs_reference:
            size = policy.abs()
        else:
            size = torch.hypot(policy, reference)
        step = 1e-3 * (1 + policy.abs())  # far above rounding, for the reward's slope
        slope = (values - loss.reward(policy - step, reference, length)).abs() / step
        return cls(values, slope * epsilon * size / length.clamp(min=1).sqrt())

    def __getitem__(self, index: Any) -> "Rewards":
        return Rewards(self.values[index], self.rounding[index])

    def is_ahead_of(self, others: "Rewards") -> Tensor:
        """1 where a reward is larger than the other, a half where they are the same within rounding."""
        difference = self.values - others.values
        is_tie = difference.abs() <= torch.hypot(self.rounding, others.rounding)
        return torch.where(is_tie, 0.5, (difference > 0).to(difference.dtype))


def format_metric(template: str, value: float) -> str:
    """The value in a format, in which a negative number that is rounded to zero has no sign."""
    text = template.format(value)
    return text.lstrip("-") if float(text.rstrip("%")) == 0 else text


def mean(values: Float[Tensor, "_"]) -> Float[Tensor, ""]:
    return values.detach().sum() / max(1, len(values))


def mean_of_side(values: Float[Tensor, "r"], is_side: Bool[Tensor, "r"]) -> Float[Tensor, ""]:
    """The mean over the rows of a side, 0 where it has none."""
    return values.detach().where(is_side, 0.0).sum() / is_side.sum().clamp(min=1)


class MetricSums:
    """Adds up the metrics of batches, so that means are over all pairs and never means of means."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a batch."""
        if metrics:  # one copy from the device for all of them
            values = torch.stack([value.detach() for value in metrics.values()]).tolist()
            self.add_values(dict(zip(metrics, values, strict=True)))

    def add_values(self, metrics: Mapping[str, float]) -> None:
        """Add metrics of one batch or of several, as `result` gives them."""
        for name, value in metrics.items():
            weight = 1.0 if name in COUNTS else metrics[count_name(name, metrics)]
            self.sums[name] = self.sums.get(name, 0.0) + value * weight

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means and counts over everything added; `reduce` sums a tensor over processes."""
        if not self.sums:
            return {}
        sums = self.sums
        if reduce is not None:
            table = reduce(torch.tensor(list(sums.values()), dtype=torch.float64, device="cpu"))
            sums = dict(zip(sums, table.tolist(), strict=True))
        result = {
            name: value if name in COUNTS else value / max(1.0, sums[count_name(name, sums)])
            for name, value in sums.items()
        }
        if "rewards/margins" in result and all(side in result for side in SIDE_COUNTS):
            result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
        return result


def count_name(name: str, metrics: Mapping[str, Any]) -> str:
    """The count that a mean is over: of the rows of its own side, where these are counted."""
    side = f"rows/{name.rsplit('/')[-1].removeprefix('ref_')}"
    return side if side in metrics else next(count for count in VALID_COUNTS if count in metrics)
