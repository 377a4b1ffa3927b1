"""Log-probs from logits that a model has computed already, without a tensor of log-softmax."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.log_probs.backward import forbid_double_backward
from dpo_wrapper.log_probs.checks import check_in_vocabulary
from dpo_wrapper.log_probs.dtypes import accumulation_dtype
from dpo_wrapper.log_probs.tiles import even_slices

CHUNK_BYTES = {"cpu": 16 * 2**20, "other": 256 * 2**20}
"""The memory of the rows of logits that are computed at once, in float32."""


def log_probs_from_logits(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-probs of `targets` in nats, from logits, without ever holding a log-softmax.

    Only the rows that the mask selects are computed. Equal to:

        logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]      # and 0 where not mask

    Args:
        logits: Float[... v]. They are aligned with the targets: `logits[k]` predicts `targets[k]`.
        targets: Int[...], in [0, v) where the mask is True.
        mask: Bool[...], True on the tokens to score. Without it all are scored.

    Returns:
        Float[...], at most 0, in float32 (float64 where the logits are).

    Raises:
        TypeError: logits are no floats, targets no integers, or the mask is not bool.
        ValueError: the shapes differ, or a target is outside the vocabulary.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits should be a tensor of floats, but it is {describe_type(logits)}.")
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"targets should be a tensor of token ids (int64), but it is {describe_type(targets)}."
        )
    for name, tensor in {"targets": targets, "mask": mask}.items():
        if tensor is not None and tensor.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} should have the shape of logits without the vocabulary, "
                f"{tuple(logits.shape[:-1])}, but its shape is {tuple(tensor.shape)}."
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask should be bool, but it is {mask.dtype}.")
    v = logits.shape[-1]
    flat = targets.flatten().long()
    row_index = (torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.flatten()).nonzero()[:, 0]
    scored = flat[row_index]
    check_in_vocabulary(scored, v)
    log_probs = gather_log_probs(logits.reshape(-1, v), row_index, scored)
    return log_probs.new_zeros(len(flat)).index_put((row_index,), log_probs).view(targets.shape)


def describe_type(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def gather_log_probs(
    logits: Float[Tensor, "n v"],
    row_index: Int[Tensor, "t"],
    targets: Int[Tensor, "t"],
    extras: Sequence[str] = (),
) -> Any:
    """`logits.float().log_softmax(-1)[row_index, targets]`, in nats, in float32 or wider.

    A row may be indexed several times. With `extras`, of which only `'log_sum_p2'` exists here, it returns a
    tuple of the log-probs and a dict, as `token_log_probs` does.
    """
    assert set(extras) <= {"log_sum_p2"}, extras
    log_probs, *values = LogProbsFromLogits.apply(logits, row_index, targets, bool(extras))
    return (log_probs, {"log_sum_p2": values[0]}) if extras else log_probs


class LogProbsFromLogits(torch.autograd.Function):
    """Log-probs and, if needed, log Σ p² without gradients; a row that is used repeatedly is read once."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, row_index: Tensor, targets: Tensor, needs_log_sum_p2: bool
    ) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(logits.dtype)
        unique_rows, row_of_target, counts = row_index.unique(return_inverse=True, return_counts=True)
        lse = logits.new_empty(len(unique_rows), dtype=dtype)
        log_sum_p2 = torch.empty_like(lse)
        for chunk in row_chunks(logits, len(unique_rows)):
            rows = logits.index_select(0, unique_rows[chunk]).to(dtype)
            lse[chunk] = rows.logsumexp(dim=-1)
            if needs_log_sum_p2:
                log_sum_p2[chunk] = rows.log_softmax(dim=-1).mul_(2).logsumexp(dim=-1)
        if ctx.needs_input_grad[0]:  # the targets of a chunk are one slice of their order, known to the host
            ctx.ends, order = counts.cumsum(0).tolist(), row_of_target.argsort(stable=True)
            ctx.save_for_backward(logits, targets, unique_rows, row_of_target, order, lse)
        extras = (log_sum_p2[row_of_target],) if needs_log_sum_p2 else ()
        ctx.mark_non_differentiable(*extras)
        return (logits[row_index, targets].to(dtype) - lse[row_of_target]).clamp(max=0.0), *extras

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("logits.log_softmax(-1)")
        logits, targets, unique_rows, row_of_target, order, lse = ctx.saved_tensors
        covers_all = len(unique_rows) == len(logits)
        logits_grad = torch.empty_like(logits) if covers_all else torch.zeros_like(logits)
        row_grad = torch.zeros_like(lse).index_add_(0, row_of_target, grad)
        for chunk in row_chunks(logits, len(unique_rows)):
            chunk_grad = logits.index_select(0, unique_rows[chunk]).to(lse.dtype)
            chunk_grad = chunk_grad.sub_(lse[chunk, None]).exp_().mul_(-row_grad[chunk, None])
            tokens = order[0 if chunk.start == 0 else ctx.ends[chunk.start - 1] : ctx.ends[chunk.stop - 1]]
            index = (row_of_target[tokens] - chunk.start, targets[tokens])
            chunk_grad.index_put_(index, grad[tokens], accumulate=True)
            logits_grad.index_copy_(0, unique_rows[chunk], chunk_grad.to(logits.dtype))
        return logits_grad, None, None, None


def row_chunks(logits: Float[Tensor, "n v"], count: int) -> Iterator[slice]:
    """Cut `count` rows into chunks of `CHUNK_BYTES`."""
    row_bytes = logits.shape[-1] * accumulation_dtype(logits.dtype).itemsize
    chunk_bytes = CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES["other"])
    return even_slices(count, chunk_bytes // max(1, row_bytes))
