"""The gated delta rule over short sequences, with the state before and behind them, in plain torch.

Each token lets the state S, a map from keys to values, decay, corrects what it holds under the token's key,
and reads what it holds under its query:

    S_t = exp(g_t) S_{t-1} + β_t k_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)ᵀ        o_t = S_tᵀ q_t

(Yang et al. 2025, Gated Delta Networks, arXiv 2412.06464, eq. 10). With the state before the first token
known, the corrections of all n tokens solve one triangular system, and all else is products of matrices
(section 3.3 of the paper, which does not know the state yet and solves two systems).
"""

import torch
from jaxtyping import Float
from torch import Tensor


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
    quadratic in n. `log_decay` should not be positive.
    """
    heads = k.shape[2], v.shape[2] // k.shape[2]
    # an axis for the value heads that share a head of q and k
    q, k = (t.transpose(1, 2)[:, :, None].contiguous() for t in (q, k))
    v, log_decay, beta = (t.transpose(1, 2).unflatten(1, heads) for t in (v, log_decay, beta))
    n = q.shape[-2]
    since_start = log_decay.cumsum(-1)  # the logarithm of what is left at each token of the state before
    is_later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    differences = since_start[..., :, None] - since_start[..., None, :]
    decay = differences.masked_fill(is_later, -torch.inf).exp()
    left, targets, beta = since_start.exp()[..., None], v, beta[..., None]
    if state is not None:
        state = state.unflatten(1, heads)
        targets = torch.addcmul(v, left, k @ state, value=-1)
    overlaps = (k @ k.mT) * (decay * beta)
    corrections = torch.linalg.solve_triangular(overlaps, targets * beta, upper=False, unitriangular=True)
    out = ((q @ k.mT) * decay) @ corrections
    state_behind = k.mT @ (corrections * decay[..., -1, :, None])
    if state is not None:
        out = torch.addcmul(out, left, q @ state)
        state_behind = torch.addcmul(state_behind, left[..., -1:, :], state)
    return out.flatten(1, 2).transpose(1, 2), state_behind.flatten(1, 2)
