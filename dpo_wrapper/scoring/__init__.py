"""Log-probs of sequences under a model."""

from dpo_wrapper.scoring.fused_loss import group_tokens
from dpo_wrapper.scoring.probe import SharePrefix
from dpo_wrapper.scoring.scorer import Scorer, sequence_log_probs
from dpo_wrapper.scoring.uncompiled import runs_uncompiled, was_compiled

__all__ = ["Scorer", "SharePrefix", "group_tokens", "runs_uncompiled", "sequence_log_probs", "was_compiled"]
