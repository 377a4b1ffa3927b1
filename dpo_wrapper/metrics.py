"""Metrics of a batch, under the names that logs, reports and other tools use.

docs/evaluation.md lists them. Log-probs and rewards are in nats and are means over the valid pairs (lists,
rows); what they are for ranked lists and for rows with a label stands there too.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dpo_wrapper.batches.batch import Batch
from dpo_wrapper.losses.inputs import PairLogProbs, RankedLogProbs, UnpairedLogProbs

VALID_COUNTS = ("pairs/valid", "lists/valid", "rows/valid", "tokens/scored")
SIDE_COUNTS = ("rows/chosen", "rows/rejected")
COUNTS = (*VALID_COUNTS, *SIDE_COUNTS, "tokens/unique", "tokens/padded")
"""Metrics that add up over batches; all others are means over what one of these counts."""

Metrics = dict[str, Tensor]
LogProbs = PairLogProbs | RankedLogProbs | UnpairedLogProbs


@torch.no_grad()
def batch_metrics(
    batch: Batch,
    log_probs: LogProbs,
    losses: Float[Tensor, "_"],
    beta: float,
    aux_loss: Float[Tensor, ""] | None = None,
) -> Metrics:
    """The metrics of one batch, as detached scalars; means are 0 where nothing is valid.

    `log_probs` comes from `batch.log_probs`, `losses` has one per pair (list, row), `beta` scales rewards.
    `aux_loss` is the loss that balances experts, where it is computed.
    """
    if isinstance(log_probs, PairLogProbs):
        valid, metrics = "pairs/valid", pair_metrics(log_probs, beta)
    elif isinstance(log_probs, RankedLogProbs):
        valid, metrics = "lists/valid", ranked_metrics(log_probs, beta)
    else:
        valid, metrics = "rows/valid", unpaired_metrics(log_probs, beta)
    num_unique, num_padded = batch.sequences.unique_tokens(), batch.sequences.ids.numel()
    sizes = {valid: len(losses), "tokens/unique": num_unique, "tokens/padded": num_padded}
    size_tensors = {name: losses.new_full((), size) for name, size in sizes.items()}
    aux_metrics = {} if aux_loss is None else {"aux_loss": aux_loss.detach().to(losses)}
    return {"loss": mean(losses)} | aux_metrics | metrics | size_tensors


def pair_metrics(pairs: PairLogProbs, beta: float) -> Metrics:
    differences = pairs.chosen_logratio - pairs.rejected_logratio
    values = {
        "rewards/chosen": beta * pairs.chosen_logratio,
        "rewards/rejected": beta * pairs.rejected_logratio,
        "rewards/margins": beta * differences,
        "rewards/accuracies": is_ahead(differences),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "length/chosen": pairs.chosen_length.to(differences.dtype),
        "length/rejected": pairs.rejected_length.to(differences.dtype),
    }
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        values["logps/ref_chosen"] = pairs.ref_chosen
        values["logps/ref_rejected"] = pairs.ref_rejected
        values["kl/chosen"] = pairs.chosen_logratio
    return {name: mean(value) for name, value in values.items()}


def ranked_metrics(lists: RankedLogProbs, beta: float) -> Metrics:
    is_real, rewards = lists.is_real, beta * lists.logratio
    rank = torch.arange(is_real.shape[1], device=is_real.device)
    is_best = rank == is_real.int().argmax(dim=-1, keepdim=True)  # the first with a scored token
    is_pair = is_real[:, :, None] & is_real[:, None, :] & (rank[:, None] < rank)
    is_right = is_ahead(rewards[:, :, None] - rewards[:, None, :]).where(is_pair, 0.0)
    sides = (is_best, is_real & ~is_best)
    values = side_metrics(
        lambda table: [table.where(side, 0.0).sum(dim=-1) / side.sum(dim=-1) for side in sides], lists, beta
    )
    values["rewards/accuracies"] = is_right.sum(dim=(1, 2)) / is_pair.sum(dim=(1, 2))
    return {name: mean(value) for name, value in values.items()}


def unpaired_metrics(rows: UnpairedLogProbs, beta: float) -> Metrics:
    """Metrics of rows with a label; the means of a side are 0 where it has no row."""
    sides = (rows.label, ~rows.label)
    above_kl = beta * (rows.logratio - rows.kl.clamp(min=0))
    return {
        "kl": rows.kl.detach(),
        "rewards/accuracies": mean(is_ahead(above_kl.where(rows.label, -above_kl))),
        **side_metrics(lambda values: [mean_of_side(values, side) for side in sides], rows, beta),
        **{name: side.sum().to(rows.policy.dtype) for name, side in zip(SIDE_COUNTS, sides, strict=True)},
    }


def side_metrics(
    split_sides: Callable[[Tensor], list[Tensor]], log_probs: RankedLogProbs | UnpairedLogProbs, beta: float
) -> Metrics:
    """Rewards, log-probs and lengths of the two sides that `split_sides` makes of all values."""
    tables = {"rewards/": beta * log_probs.logratio, "logps/": log_probs.policy}
    if log_probs.length is not None:
        tables["length/"] = log_probs.length.to(log_probs.policy.dtype)
    if log_probs.reference is not None:
        tables["logps/ref_"] = log_probs.reference
    metrics = {
        name + side: values
        for name, table in tables.items()
        for side, values in zip(("chosen", "rejected"), split_sides(table), strict=True)
    }
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    if log_probs.reference is not None:
        metrics["kl/chosen"] = metrics["rewards/chosen"] / beta
    return metrics


def is_ahead(difference: Tensor) -> Tensor:
    """1 where the difference is positive, a half for a tie."""
    return (difference > 0).to(difference.dtype) + 0.5 * (difference == 0).to(difference.dtype)


def mean(values: Float[Tensor, "_"]) -> Float[Tensor, ""]:
    return values.detach().sum() / max(1, len(values))


def mean_of_side(values: Float[Tensor, "r"], is_side: Bool[Tensor, "r"]) -> Float[Tensor, ""]:
    """The mean over the rows of a side, 0 where it has none."""
    return values.detach().where(is_side, 0.0).sum() / is_side.sum().clamp(min=1)


class MetricSums:
    """Adds up the metrics of batches, so that means are over all pairs and never means of means."""

    def __init__(self) -> None:
        self.sums: Metrics = {}

    def add(self, metrics: Metrics) -> None:
        if not metrics:
            return
        terms = [
            value.detach() * (1.0 if name in COUNTS else metrics[count_name(name, metrics)])
            for name, value in metrics.items()
        ]
        # one copy from the device for all of them
        for name, term in zip(metrics, torch.stack(terms).cpu().double(), strict=True):
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means and counts over everything added; `reduce` sums a tensor over processes."""
        if not self.sums:
            return {}
        table = torch.stack(list(self.sums.values()))
        sums = dict(zip(self.sums, (table if reduce is None else reduce(table)).tolist(), strict=True))
        result = {
            name: value if name in COUNTS else value / max(1.0, sums[count_name(name, sums)])
            for name, value in sums.items()
        }
        if all(side in result for side in SIDE_COUNTS):
            result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
        return result


def count_name(name: str, metrics: Metrics | dict[str, float]) -> str:
    """The count that a mean is over: of the rows of its own side, where these are counted."""
    side = f"rows/{name.rsplit('/')[-1].removeprefix('ref_')}"
    return side if side in metrics else next(count for count in VALID_COUNTS if count in metrics)
