"""What a batch of pairs says about training, under the names that logs, reports and other tools use.

Log-probs and rewards are in nats and are means over the valid pairs:

    loss                    mean loss
    rewards/chosen          β·a, with a = p_w - r_w the chosen log-ratio (p_w without a reference)
    rewards/rejected        β·b
    rewards/margins         β·(a - b)
    rewards/accuracies      how often the margin is positive; a tie counts half
    logps/chosen ...        log-probs of each side, under the policy and (ref_) the reference
    kl/chosen               a: how far the policy has moved, measured on the chosen completions
    length/chosen ...       scored tokens
    pairs/valid             number of valid pairs
    tokens/unique           real tokens, shared prefixes counted once
    tokens/padded           tokens that went through the model, padding included
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.losses import PairLogProbs
from dpo_wrapper.sequences import PreferenceBatch

COUNTS = ("pairs/valid", "tokens/unique", "tokens/padded")
"""Metrics that add up over batches; all others are means over `pairs/valid` pairs."""


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
        "rewards/accuracies": (margins > 0).to(margins.dtype) + 0.5 * (margins == 0).to(margins.dtype),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
        "length/chosen": pairs.chosen_length.to(margins.dtype),
        "length/rejected": pairs.rejected_length.to(margins.dtype),
    }
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        values["logps/ref_chosen"] = pairs.ref_chosen
        values["logps/ref_rejected"] = pairs.ref_rejected
        values["kl/chosen"] = pairs.chosen_logratio
    means = {name: value.detach().sum() / max(1, len(margins)) for name, value in values.items()}
    counts = (len(margins), batch.sequences.unique_tokens(), batch.sequences.ids.numel())
    return means | {name: margins.new_tensor(float(n)) for name, n in zip(COUNTS, counts, strict=True)}


class MetricSums:
    """Adds up the metrics of batches, so that means are over all pairs and never means of means."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            term = (value if name in COUNTS else value * metrics["pairs/valid"]).detach().cpu().double()
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def result(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means and counts over everything added; `reduce` sums a tensor over processes."""
        if not self.sums:
            return {}
        names = list(self.sums)
        table = torch.stack([self.sums[name] for name in names])
        values = dict(zip(names, (table if reduce is None else reduce(table)).tolist(), strict=True))
        pairs = max(1.0, values["pairs/valid"])
        return {name: value if name in COUNTS else value / pairs for name, value in values.items()}
