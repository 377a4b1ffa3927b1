"""Log-probs of sequences under a model."""

from dpo_wrapper.scoring.fused_loss import group_tokens
from dpo_wrapper.scoring.probe import SharePrefix
from dpo_wrapper.scoring.scorer import Scorer, sequence_log_probs
from dpo_wrapper.scoring.uncompiled import compile_note, runs_uncompiled

__all__ = [
    "Scorer",
    "SharePrefix",
    "compile_note",
    "group_tokens",
    "runs_uncompiled",
    "sequence_log_probs",
]
