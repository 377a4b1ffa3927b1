"""The losses that TRL has, by its own names and options, and the package's."""

from dataclasses import replace
from typing import Any

from dpo_wrapper.losses import (
    AOT,
    BCO,
    CPO,
    EXO,
    IPO,
    NCA,
    SFT,
    SPPO,
    AlphaDivergence,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Divergence,
    ForwardKL,
    Hinge,
    JensenShannon,
    Loss,
    ReferenceFree,
    ReverseKL,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SimPO,
)

DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "js_divergence": JensenShannon(),
    "alpha_divergence": AlphaDivergence(0.5),
}

# TRL's name, its options, the loss
DPO_LOSSES: list[tuple[str, dict, Loss]] = [
    ("sigmoid", {}, Sigmoid(0.3)),
    ("robust", {"label_smoothing": 0.2}, Robust(0.3, 0.2)),
    ("hinge", {}, Hinge(0.3)),
    ("ipo", {}, IPO(0.3)),
    ("sigmoid_norm", {}, SigmoidNorm(0.3)),
    ("exo_pair", {"label_smoothing": 1e-2}, EXO(0.3, 1e-2)),
    ("discopop", {"discopop_tau": 0.2}, DiscoPOP(0.3, tau=0.2)),
    ("nca_pair", {}, NCA(0.3)),
    ("bco_pair", {}, BCO(0.3)),
    ("sppo_hard", {}, SPPO(0.3)),
    ("aot", {"label_smoothing": 0.1}, AOT(0.3, 0.1)),
    ("aot_unpaired", {"label_smoothing": 0.1}, AOTUnpaired(0.3, 0.1)),
    ("apo_zero", {}, APOZero(0.3)),
    ("apo_down", {}, APODown(0.3)),
    ("sft", {}, SFT()),
]
CPO_LOSSES = [
    ({"cpo_alpha": 0.7, "label_smoothing": 0.1}, CPO(0.3, 0.1, 0.7)),
    ({"cpo_alpha": 0.0}, CPO(0.3, alpha=0.0)),
    ({"cpo_alpha": 0.0}, ReferenceFree(0.3)),
    ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4}, SimPO(0.3, 0.4)),
    ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4, "alpha": 0.25}, AlphaPO(0.3, 0.4, 0.25)),
    ({"loss_type": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 0.4}, [(SimPO(0.3, 0.4), 1.0), (SFT(), 0.5)]),
]


def with_divergence(loss: Any, divergence: str) -> Loss:
    """A loss of scores with one of `DIVERGENCES`; any other loss as it is."""
    return replace(loss, divergence=DIVERGENCES[divergence]) if hasattr(loss, "divergence") else loss
