"""Preference losses: small frozen dataclasses from log-probs of sequences to one value per pair, list or row.

Losses know no model and do not reduce. Names, per pair, all in nats: `p_w, p_l` are the policy's and `r_w,
r_l` the reference's log-probs of chosen and rejected, summed over the scored tokens; `n_w, n_l` are the
numbers of these tokens; `a = p_w - r_w`, `b = p_l - r_l`; `Δ = s_w - s_l`, with the scores `s_w = a`,
`s_l = b` unless a divergence says otherwise.
"""

from dpo_wrapper.losses.base import Loss, PairLoss, number_field
from dpo_wrapper.losses.batchwise import AOT, AOTUnpaired, BetaDPO
from dpo_wrapper.losses.combine import CombinedLoss, as_weighted_losses
from dpo_wrapper.losses.divergences import AlphaDivergence, Divergence, ForwardKL, JensenShannon, ReverseKL
from dpo_wrapper.losses.functional import dpo_loss
from dpo_wrapper.losses.inputs import PairLogProbs, RankedLogProbs, UnpairedLogProbs
from dpo_wrapper.losses.listwise import PlackettLuce
from dpo_wrapper.losses.pairwise import DPOP, EXO, IPO, DiscoPOP, Hinge, Robust, Sigmoid, SigmoidNorm
from dpo_wrapper.losses.pointwise import BCO, NCA, SPPO, APODown, APOZero
from dpo_wrapper.losses.reference_free import CPO, ORPO, SFT, AlphaPO, ReferenceFree, SimPO
from dpo_wrapper.losses.registry import losses_by_name, parse_losses
from dpo_wrapper.losses.unpaired import KTO

__all__ = [
    "AOT", "BCO", "CPO", "DPOP", "EXO", "IPO", "KTO", "NCA", "ORPO", "SFT", "SPPO", "AOTUnpaired", "APODown",
    "APOZero", "AlphaDivergence", "AlphaPO", "BetaDPO", "CombinedLoss", "DiscoPOP", "Divergence", "ForwardKL",
    "Hinge", "JensenShannon", "Loss", "PairLogProbs", "PairLoss", "PlackettLuce", "RankedLogProbs",
    "ReferenceFree", "ReverseKL", "Robust", "Sigmoid", "SigmoidNorm", "SimPO", "UnpairedLogProbs",
    "as_weighted_losses", "dpo_loss", "losses_by_name", "number_field", "parse_losses",
]  # fmt: skip
