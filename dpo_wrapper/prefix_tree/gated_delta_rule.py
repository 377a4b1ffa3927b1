"""The gated delta rule over short sequences, with the state before and behind them, in plain torch.

Each token lets the state S, a map from keys to values, decay, corrects what it holds under the token's key,
and reads what it holds under its query:

    S_t = exp(g_t) S_{t-1} + β_t k_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)ᵀ        o_t = S_tᵀ q_t

(Yang et al. 2025, Gated Delta Networks, arXiv 2412.06464, eq. 10). With the state before the first token
known, the corrections of all n tokens solve one triangular system, and all else is products of matrices
(section 3.3 of the paper, which does not know the state yet and solves two systems). Of what the forward pass
computes, the backward pass is given the corrections alone: the rest takes more memory than time.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def apply_gated_delta_rule(
    q: Float[Tensor, "g n h d"],
    k: Float[Tensor, "g n h d"],
    v: Float[Tensor, "g n v e"],
    log_decay: Float[Tensor, "g n v"],
    beta: Float[Tensor, "g n v"],
    state: Float[Tensor, "g v d e"] | None = None,
) -> tuple[Float[Tensor, "g n v e"], Float[Tensor, "g v d e"]]:
    """The outputs, and the state behind the last token; without a state before the first, that is zero.

    Each head of q and k belongs to v // h heads of the values that follow one another. Memory and time are
    quadratic in n. `log_decay` should not be positive. Under autocast it computes in float32.
    """
    heads = k.shape[2], v.shape[2] // k.shape[2]
    # an axis for the value heads that share a head of q and k
    q, k = (t.transpose(1, 2)[:, :, None].contiguous() for t in (q, k))
    v, log_decay, beta = (t.transpose(1, 2).unflatten(1, heads) for t in (v, log_decay, beta))
    state = None if state is None else state.unflatten(1, heads)
    out, state_behind = _GatedDeltaRule.apply(q, k, v, log_decay.cumsum(-1), beta[..., None], state)
    return out.flatten(1, 2).transpose(1, 2), state_behind.flatten(1, 2)


class _GatedDeltaRule(torch.autograd.Function):
    """The rule for q and k [g h 1 n d], v [g h m n e], beta [g h m n 1], and a state [g h m d e] or None.

    `since_start` [g h m n] is the logarithm of what is left at each token of the state before the first.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, since_start: Tensor, beta: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        decay, left = decays(since_start)
        targets = v if state is None else torch.addcmul(v, left, k @ state, value=-1)
        overlaps = (k @ k.mT) * (decay * beta)
        corrections = torch.linalg.solve_triangular(overlaps, targets * beta, upper=False, unitriangular=True)
        out = ((q @ k.mT) * decay) @ corrections
        state_behind = k.mT @ (corrections * decay[..., -1, :, None])
        if state is not None:
            out = torch.addcmul(out, left, q @ state)
            state_behind = torch.addcmul(state_behind, left[..., -1:, :], state)
        ctx.save_for_backward(q, k, v, since_start, beta, state, corrections)
        return out, state_behind

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(  # type: ignore[override]
        ctx: Any, d_out: Tensor, d_state_behind: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, since_start, beta, state, corrections = ctx.saved_tensors
        decay, left = decays(since_start)
        decay_to_end = decay[..., -1, :, None]
        scores, overlaps = (q @ k.mT) * decay, (k @ k.mT) * decay

        d_kept = (k @ d_state_behind) * decay_to_end
        d_corrections = scores.mT @ d_out + d_kept
        d_solved = torch.linalg.solve_triangular(
            (overlaps * beta).mT, d_corrections, upper=True, unitriangular=True
        )
        d_scores, d_overlaps = d_out @ corrections.mT, (d_solved @ corrections.mT).tril(-1).neg_()
        d_beta = (d_overlaps * overlaps).sum(-1, keepdim=True) + (d_solved * v).sum(-1, keepdim=True)
        d_overlaps *= beta
        d_v = d_solved * beta

        # each element of `decay` is the exponential of a difference of two elements of `since_start`
        d_differences = d_scores * scores + d_overlaps * overlaps
        d_differences[..., -1, :] += (d_kept * corrections).sum(-1)
        d_since_start = d_differences.sum(-1) - d_differences.sum(-2)

        d_scores *= decay
        d_overlaps *= decay
        d_q = d_scores @ k
        d_k = d_scores.mT @ q + (d_overlaps + d_overlaps.mT) @ k
        d_k += (corrections * decay_to_end) @ d_state_behind.mT
        d_state = None
        if state is not None:
            d_read, d_held = left * d_out, left * d_solved
            from_q, from_k = d_read @ state.mT, d_held @ state.mT
            along_k = (from_k * k).sum(-1, keepdim=True)
            d_q, d_k, d_beta = d_q + from_q, d_k - from_k * beta, d_beta - along_k
            d_since_start += ((from_q * q).sum(-1, keepdim=True) - along_k * beta)[..., 0]
            d_since_start[..., -1] += left[..., -1, 0] * (d_state_behind * state).sum((-1, -2))
            d_state = q.mT @ d_read - k.mT @ (d_held * beta) + left[..., -1:, :] * d_state_behind
        d_q, d_k = (t.sum(2, keepdim=True) for t in (d_q, d_k))
        return d_q, d_k, d_v, d_since_start, d_beta, d_state


def decays(
    since_start: Float[Tensor, "*b n"],
) -> tuple[Float[Tensor, "*b n n"], Float[Tensor, "*b n 1"]]:
    """What is left at each token of each token before it, and of the state before the first."""
    n = since_start.shape[-1]
    is_later = torch.ones(n, n, dtype=torch.bool, device=since_start.device).triu(1)
    differences = since_start[..., :, None] - since_start[..., None, :]
    return differences.masked_fill_(is_later, -torch.inf).exp_(), since_start.exp()[..., None]
