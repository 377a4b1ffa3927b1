"""What a batch says about training, under the names that logs, reports and other tools use.

Log-probs and rewards are in nats and are means over the valid pairs (lists, rows):

    loss                    mean loss
    rewards/chosen          β·a, with a = p_w - r_w the chosen log-ratio (p_w without a reference)
    rewards/rejected        β·b
    rewards/margins         β·(a - b)
    rewards/accuracies      how often the margin is positive; a tie counts half
    logps/chosen ...        log-probs of each side, under the policy and (ref_) the reference
    kl/chosen               a: how far the policy has moved, measured on the chosen completions
    length/chosen ...       scored tokens
    pairs/valid             number of valid pairs (lists/valid, rows/valid)
    tokens/unique           real tokens, shared prefixes counted once
    tokens/padded           tokens that went through the model, padding included

In a ranked list the best completion is chosen, and what stands under rejected is the mean of all others;
`rewards/accuracies` is the share of its pairs that the rewards put in the right order. Of rows with a label,
means of a side are over the rows of that label (rows/chosen, rows/rejected), the margin is the difference of
two such means, a row is accurate whose reward is on the right side of the KL's, and `kl` is that estimate.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.batches.sequences import PreferenceBatch, ScoredSequences
from dpo_wrapper.losses import PairLogProbs, RankedLogProbs, UnpairedLogProbs

VALID = ("pairs/valid", "lists/valid", "rows/valid")
SIDES = ("rows/chosen", "rows/rejected")
TOKENS = ("tokens/unique", "tokens/padded")
COUNTS = (*VALID, *SIDES, *TOKENS)
"""Metrics that add up over batches; all others are means over what one of these counts."""


def in_order(gap: Tensor) -> Tensor:
    """1 where the better one is ahead, a half for a tie."""
    return (gap > 0).to(gap.dtype) + 0.5 * (gap == 0).to(gap.dtype)


def mean(values: Float[Tensor, "_"]) -> Float[Tensor, ""]:
    return values.detach().sum() / max(1, len(values))


def counts(sequences: ScoredSequences, like: Tensor, **valid: int) -> dict[str, Tensor]:
    """The counts of a batch, as numbers of the dtype of its metrics."""
    tokens = (sequences.unique_tokens(), sequences.ids.numel())
    named = {name.replace("_", "/"): count for name, count in valid.items()}
    return {
        name: like.new_tensor(float(n))
        for name, n in (named | dict(zip(TOKENS, tokens, strict=True))).items()
    }


@torch.no_grad()
def pair_metrics(
    batch: PreferenceBatch, pairs: PairLogProbs, per_pair: Float[Tensor, "p"], beta: float
) -> dict[str, Tensor]:
    """The metrics of one batch, as detached scalars; means are 0 where no pair is valid."""
    margins = pairs.chosen_logratio - pairs.rejected_logratio
    values = {
        "loss": per_pair,
        "rewards/chosen": beta * pairs.chosen_logratio,
        "rewards/rejected": beta * pairs.rejected_logratio,
        "rewards/margins": beta * margins,
        "rewards/accuracies": in_order(margins),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "length/chosen": pairs.chosen_length.to(margins.dtype),
        "length/rejected": pairs.rejected_length.to(margins.dtype),
    }
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        values["logps/ref_chosen"] = pairs.ref_chosen
        values["logps/ref_rejected"] = pairs.ref_rejected
        values["kl/chosen"] = pairs.chosen_logratio
    means = {name: mean(value) for name, value in values.items()}
    return means | counts(batch.sequences, margins, pairs_valid=len(margins))


@torch.no_grad()
def list_metrics(
    sequences: ScoredSequences, lists: RankedLogProbs, per_list: Float[Tensor, "l"], beta: float
) -> dict[str, Tensor]:
    """The same of ranked lists."""
    real, rewards = lists.real, beta * lists.logratio
    place = torch.arange(real.shape[1], device=real.device)
    best = place == real.int().argmax(dim=-1, keepdim=True)  # the first with a score
    better = real[:, :, None] & real[:, None, :] & (place[:, None] < place)
    right = in_order(rewards[:, :, None] - rewards[:, None, :]).where(better, 0.0)

    def split(table: Tensor) -> list[Tensor]:
        return [table.where(side, 0.0).sum(dim=-1) / side.sum(dim=-1) for side in (best, real & ~best)]

    values = {"loss": per_list, **by_side(split, lists, beta)}
    values["rewards/accuracies"] = right.sum(dim=(1, 2)) / better.sum(dim=(1, 2))
    means = {name: mean(value) for name, value in values.items()}
    return means | counts(sequences, rewards, lists_valid=len(rewards))


@torch.no_grad()
def row_metrics(
    sequences: ScoredSequences, rows: UnpairedLogProbs, per_row: Float[Tensor, "r"], beta: float
) -> dict[str, Tensor]:
    """The same of rows with a label; means of a side are 0 where it has no row."""
    sides = (rows.label, ~rows.label)
    above = beta * (rows.logratio - rows.shift.clamp(min=0))
    means = {
        "loss": mean(per_row),
        "kl": rows.shift.detach(),
        "rewards/accuracies": mean(in_order(above.where(rows.label, -above))),
        **by_side(lambda values: [mean(values[side]) for side in sides], rows, beta),
    }
    wanted, others = (int(side.sum()) for side in sides)
    return means | counts(sequences, above, rows_valid=len(above), rows_chosen=wanted, rows_rejected=others)


def by_side(
    split: Callable[[Tensor], list[Tensor]], data: RankedLogProbs | UnpairedLogProbs, beta: float
) -> dict[str, Tensor]:
    """Rewards, log-probs and lengths of the two sides that `split` makes of all values."""
    tables = {"rewards/": beta * data.logratio, "logps/": data.policy}
    if data.length is not None:
        tables["length/"] = data.length.to(data.policy.dtype)
    if data.reference is not None:
        tables["logps/ref_"] = data.reference
    found = {
        name + side: values
        for name, table in tables.items()
        for side, values in zip(("chosen", "rejected"), split(table), strict=True)
    }
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if data.reference is not None:
        found["kl/chosen"] = found["rewards/chosen"] / beta
    return found


class MetricSums:
    """Adds up the metrics of batches, so that means are over all pairs and never means of means."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            term = (value if name in COUNTS else value * metrics[over(name, metrics)]).detach().cpu().double()
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means and counts over everything added; `reduce` sums a tensor over processes."""
        if not self.sums:
            return {}
        names = list(self.sums)
        table = torch.stack([self.sums[name] for name in names])
        values = dict(zip(names, (table if reduce is None else reduce(table)).tolist(), strict=True))
        found = {
            name: value if name in COUNTS else value / max(1.0, values[over(name, values)])
            for name, value in values.items()
        }
        if all(side in found for side in SIDES):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def over(name: str, there: dict[str, Tensor] | dict[str, float]) -> str:
    """The count that a mean is over: of the rows of its own side, where these are counted."""
    side = f"rows/{name.rsplit('/')[-1].removeprefix('ref_')}"
    return side if side in there else next(count for count in VALID if count in there)
