"""Where reference log-probs come from."""

from dpo_wrapper.reference.cache import LogProbCache
from dpo_wrapper.reference.precompute import precompute_ref_log_probs
from dpo_wrapper.reference.reference import CachedReference

__all__ = ["CachedReference", "LogProbCache", "precompute_ref_log_probs"]
