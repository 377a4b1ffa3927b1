"""What `DPO.forward` takes: sequences with scored tokens, and how they meet in a loss."""

from dpo_wrapper.batches.batch import Batch, Reduce, SFTBatch, normalize_over_step
from dpo_wrapper.batches.preference import PreferenceBatch, batch_from_arguments
from dpo_wrapper.batches.ranked import RankedBatch
from dpo_wrapper.batches.sequences import ScoredSequences, ScoredTreeTokens, SequenceLogProbs
from dpo_wrapper.batches.unpaired import UnpairedBatch, kl_partner_indices
from dpo_wrapper.prefix_tree.layout import TreeOptions

__all__ = [
    "Batch", "PreferenceBatch", "RankedBatch", "Reduce", "SFTBatch", "ScoredSequences", "ScoredTreeTokens",
    "SequenceLogProbs", "TreeOptions", "UnpairedBatch", "batch_from_arguments", "kl_partner_indices",
    "normalize_over_step",
]  # fmt: skip
