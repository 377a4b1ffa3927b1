"""How good a policy is on pairs (lists, rows) it was not trained on."""

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
def as_one_step(
    dpo: nn.Module, batches: Sequence[Any], device: torch.device, reduce: Reduce | None = None
) -> list[Any]:
    """The batches, all of one kind, as parts of a whole by whose counts (and KL) their losses are reckoned.

    `reduce` sums a tensor over the processes, each of which must have at least one batch.
    """
    reduce = reduce or (lambda sums: sums)
    totals = reduce(torch.tensor([batch.counts() for batch in batches], device=device).sum(dim=0)).tolist()
    if not isinstance(batches[0], UnpairedBatch):
        return [batch.as_part_of(*totals) for batch in batches]
    ratios = torch.stack([dpo(batch.mismatched.to(device)) for batch in batches]).sum(dim=0)
    total, count = reduce(ratios)
    return [batch.as_part_of(*totals, total / count.clamp(min=1)) for batch in batches]


@torch.no_grad()
def evaluate(dpo: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None) -> dict[str, float]:
    """The metrics of `dpo_wrapper.metrics` over all pairs (lists, rows) of the batches.

    Args:
        dpo: a `DPO`, or a wrapper around one that passes its arguments on.
        batches: all of one kind, and each pair in exactly one of them; with several processes, each process
            has its own share.
        reduce: sums a tensor over the processes, each of which must have at least one batch.
    """
    batches, sums = list(batches), MetricSums()
    if not batches:
        raise ValueError("there is nothing to evaluate: expected at least one batch.")
    for part in as_one_step(dpo, batches, batches[0].sequences.ids.device, reduce):
        _, metrics = dpo(part, return_metrics=True)
        sums.add(metrics)
    return sums.result(reduce)


@torch.no_grad()
def complete(model: Any, prompt: list[int], most: int, eos_id: int) -> list[int]:
    """The most likely continuation, token by token: at most `most` tokens, without the end token.

    Generation is left to the library that the model comes from.
    """
    mode = model.training
    model.eval()
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    if hasattr(model, "generate"):
        mask = torch.ones_like(ids)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )
        new = out[0, len(prompt) :].tolist()
    else:
        from x_transformers import AutoregressiveWrapper

        wrapper = AutoregressiveWrapper(model)
        new = wrapper.generate(ids, most, temperature=0.0, eos_token=eos_id)[0].tolist()
    model.train(mode)
    return new[: new.index(eos_id)] if eos_id in new else new
