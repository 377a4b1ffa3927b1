"""Train any autoregressive PyTorch transformer on human preferences."""

from dpo_wrapper.batches import PreferenceBatch, RankedBatch, UnpairedBatch
from dpo_wrapper.data import PreferenceCollator, PreferenceDataset
from dpo_wrapper.dpo import DPO
from dpo_wrapper.log_probs import FusedLoss, token_log_probs
from dpo_wrapper.losses import IPO, SFT, Loss, PairLogProbs, PairLoss, Sigmoid, SigmoidNorm, SimPO, dpo_loss
from dpo_wrapper.reference import CachedReference, precompute_ref_log_probs
from dpo_wrapper.scoring import sequence_log_probs
from dpo_wrapper.version import __version__

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
