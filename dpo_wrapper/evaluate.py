"""How good a policy is on pairs it was not trained on."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.sequences import PreferenceBatch


@torch.no_grad()
def evaluate(
    dpo: nn.Module, batches: Iterable[PreferenceBatch], reduce: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """The metrics of `dpo_wrapper.metrics` over all pairs of the batches.

    Args:
        dpo: a `DPO`, or a wrapper around one that passes its arguments on.
        batches: each pair in exactly one of them; with several processes, each process has its own share.
        reduce: sums a tensor over the processes, each of which must have at least one batch.
    """
    batches, sums = list(batches), MetricSums()
    if not batches and reduce is None:
        raise ValueError("there is nothing to evaluate: expected at least one batch.")
    counts = [(*batch.counts(), batch.whole_tokens()) for batch in batches]
    totals = torch.tensor(counts, dtype=torch.long).reshape(-1, 3).sum(dim=0)
    pairs, tokens, whole = (totals if reduce is None else reduce(totals)).tolist()
    for batch in batches:
        _, metrics = dpo(batch.as_part_of(pairs, tokens, whole), return_metrics=True)
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
