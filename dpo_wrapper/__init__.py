from dpo_wrapper.batches.ranked import RankedBatch, UnpairedBatch
from dpo_wrapper.batches.sequences import PreferenceBatch
from dpo_wrapper.data import PreferenceCollator, PreferenceDataset
from dpo_wrapper.dpo import DPO
from dpo_wrapper.log_probs import Ahead, token_log_probs
from dpo_wrapper.losses import IPO, SFT, Loss, PairLogProbs, Sigmoid, SigmoidNorm, SimPO, dpo_loss
from dpo_wrapper.reference.cache import CachedReference
from dpo_wrapper.reference.precompute import cache_reference
from dpo_wrapper.scoring.scorer import sequence_log_probs
from dpo_wrapper.version import __version__

__all__ = [
    "DPO",
    "IPO",
    "SFT",
    "Ahead",
    "CachedReference",
    "Loss",
    "PairLogProbs",
    "PreferenceBatch",
    "PreferenceCollator",
    "PreferenceDataset",
    "RankedBatch",
    "Sigmoid",
    "SigmoidNorm",
    "SimPO",
    "UnpairedBatch",
    "__version__",
    "cache_reference",
    "dpo_loss",
    "sequence_log_probs",
    "token_log_probs",
]
