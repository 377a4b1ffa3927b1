"""The metrics of a policy over many batches, exactly as over one batch of all of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from dpo_wrapper.batches.ranked import RankedBatch, UnpairedBatch
from dpo_wrapper.batches.sequences import PreferenceBatch
from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.running import Reduce

Batch = PreferenceBatch | RankedBatch | UnpairedBatch


@torch.no_grad()
def normalize_over_step(
    dpo: nn.Module, batches: Sequence[Any], device: torch.device, reduce: Reduce | None = None
) -> list[Any]:
    """Attach the step's totals to each micro-batch, so that their losses add up to the step's loss.

    For KTO the totals include the step's estimate of the KL.

    Args:
        dpo: a `DPO`, or a wrapper around one that passes its arguments on.
        batches: the micro-batches of one step, all of one type.
        device: where the totals are computed.
        reduce: sums a tensor over the processes, each of which needs at least one batch.
    """
    reduce = reduce or (lambda sums: sums)
    totals = reduce(torch.tensor([batch.counts() for batch in batches], device=device).sum(dim=0)).tolist()
    if not isinstance(batches[0], UnpairedBatch):
        return [batch.as_part_of(*totals) for batch in batches]
    kl_sums = torch.stack([dpo(batch.mismatched.to(device)) for batch in batches]).sum(dim=0)
    log_ratio, count = reduce(kl_sums)
    return [batch.as_part_of(*totals, log_ratio / count.clamp(min=1)) for batch in batches]


@torch.no_grad()
def evaluate(dpo: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
    """The metrics of `dpo_wrapper.metrics` over all pairs (lists, rows) of the batches.

    Args:
        dpo: a `DPO`, or a wrapper around one that passes its arguments on.
        batches: all of one type, and each pair in exactly one of them; of several processes, each has
            batches of its own.
        reduce: sums a tensor over the processes, each of which needs at least one batch.

    Raises:
        ValueError: there is no batch.
    """
    batches, sums = list(batches), MetricSums()
    if not batches:
        raise ValueError("batches should hold at least one batch, but there is none: leave evaluation out.")
    for batch in normalize_over_step(dpo, batches, batches[0].sequences.ids.device, reduce):
        _, metrics = dpo(batch, return_metrics=True)
        sums.add(metrics)
    return sums.result(reduce)
