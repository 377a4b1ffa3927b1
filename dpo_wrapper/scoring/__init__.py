"""Log-probs of sequences under a model."""

from dpo_wrapper.scoring.fused_loss import group_tokens
from dpo_wrapper.scoring.probe import SharePrefix
from dpo_wrapper.scoring.scorer import Scorer, sequence_log_probs

__all__ = ["Scorer", "SharePrefix", "group_tokens", "sequence_log_probs"]
