"""The metrics of a policy over many batches, exactly as over one batch of all of them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.metrics import MetricSums


@torch.no_grad()
def evaluate(
    dpo: nn.Module,
    batches: Iterable[Any],
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """The metrics of `dpo_wrapper.metrics` over all pairs (lists, rows) of the batches.

    Args:
        dpo: a `DPO`, or a wrapper with a `DPO` as its `.module` that passes its arguments on.
        batches: all of one class, and each pair in exactly one of them; of several processes, each has
            batches of its own.
        reduce: sums a tensor over the processes, each of which needs at least one batch.
        progress: called with 1 after each batch.

    Raises:
        ValueError: there is no batch.
    """
    batches, sums = list(batches), MetricSums()
    if not batches:
        raise ValueError("batches should hold at least one batch, but there is none: leave evaluation out.")
    module: Any = getattr(dpo, "module", dpo)
    for batch in module.normalize_over_step(batches, reduce):
        _, metrics = dpo(batch, return_metrics=True)
        sums.add(metrics)
        if progress is not None:
            progress(1)
    return sums.result(reduce)
