"""Train any autoregressive PyTorch transformer on human preferences."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpo_wrapper.version import __version__

if TYPE_CHECKING:
    from dpo_wrapper.batches import PreferenceBatch, RankedBatch, UnpairedBatch
    from dpo_wrapper.data import PreferenceCollator, PreferenceDataset
    from dpo_wrapper.dpo import DPO
    from dpo_wrapper.log_probs import FusedLoss, token_log_probs
    from dpo_wrapper.losses import (
        IPO,
        SFT,
        Loss,
        PairLogProbs,
        PairLoss,
        Sigmoid,
        SigmoidNorm,
        SimPO,
        dpo_loss,
    )
    from dpo_wrapper.reference import CachedReference, precompute_ref_log_probs
    from dpo_wrapper.scoring import sequence_log_probs

MODULES = {
    "batches": "PreferenceBatch RankedBatch UnpairedBatch",
    "data": "PreferenceCollator PreferenceDataset",
    "dpo": "DPO",
    "log_probs": "FusedLoss token_log_probs",
    "losses": "IPO SFT Loss PairLogProbs PairLoss Sigmoid SigmoidNorm SimPO dpo_loss",
    "reference": "CachedReference precompute_ref_log_probs",
    "scoring": "sequence_log_probs",
}
"""The names that each module gives to the package, which imports it (and with it torch) at first use."""

__all__ = [
    "DPO",
    "IPO",
    "SFT",
    "CachedReference",
    "FusedLoss",
    "Loss",
    "PairLogProbs",
    "PairLoss",
    "PreferenceBatch",
    "PreferenceCollator",
    "PreferenceDataset",
    "RankedBatch",
    "Sigmoid",
    "SigmoidNorm",
    "SimPO",
    "UnpairedBatch",
    "__version__",
    "dpo_loss",
    "precompute_ref_log_probs",
    "sequence_log_probs",
    "token_log_probs",
]


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f"dpo_wrapper.{name}")
    for module, names in MODULES.items():
        if name in names.split():
            return getattr(import_module(f"dpo_wrapper.{module}"), name)
    raise AttributeError(f"module 'dpo_wrapper' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *MODULES])
