"""Where reference log-probs come from."""

from dpo_wrapper.reference.build import ReferenceKind, ReferenceOptions, build_reference
from dpo_wrapper.reference.cache import CachedReference, LogProbCache
from dpo_wrapper.reference.owner import ReferenceOwner
from dpo_wrapper.reference.precompute import precompute_ref_log_probs
from dpo_wrapper.reference.reference import Reference
from dpo_wrapper.reference.sync import sync_reference

__all__ = [
    "CachedReference",
    "LogProbCache",
    "Reference",
    "ReferenceKind",
    "ReferenceOptions",
    "ReferenceOwner",
    "build_reference",
    "precompute_ref_log_probs",
    "sync_reference",
]
