"""Where reference log-probs come from: a frozen model, the policy without its adapter, a cache, nowhere."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs
from dpo_wrapper.models.adapters import LORA_FACTOR
from dpo_wrapper.models.batch_dependence import max_independent_length
from dpo_wrapper.models.eval_mode import eval_mode
from dpo_wrapper.reference.cache import LogProbCache
from dpo_wrapper.reference.sharding import is_true_everywhere
from dpo_wrapper.reference.shared_weights import SharedWeights, saved_buffers, tensor_version
from dpo_wrapper.scoring.scorer import Scorer


class Reference(ABC):
    """Computes the reference's log-probs of sequences.

    Attributes:
        description: what it is, in messages.
        module: the reference's own model; None where there is none.
        device: where the reference stays, whatever device the policy moves to; None if it moves along.
        cache: log-probs that were computed before, where they are kept in memory.
    """

    description: ClassVar[str]
    module: nn.Module | None = None
    device: torch.device | None = None
    cache: LogProbCache | None = None

    @abstractmethod
    def __call__(self, sequences: ScoredSequences) -> SequenceLogProbs | None:
        """The log-probs of the sequences, without gradients; None where there is no reference."""

    def explain(self) -> str:
        """What the reference is and which paths it takes, in plain words."""
        return self.description


class NoReference(Reference):
    """For losses that need no reference."""

    description = "none"

    def __call__(self, sequences: ScoredSequences) -> None:
        return None


class CachedReference(LogProbCache, Reference):
    """The reference's log-probs of the sequences of data sets, as `precompute_ref_log_probs` returns them.

    `DPO(model, reference=cached)` needs no model for the reference.
    """

    description = "log-probs computed before"

    def __call__(self, sequences: ScoredSequences) -> SequenceLogProbs:
        """The log-probs of the sequences; ValueError if one is not known."""
        log_probs = self.lookup(sequences)
        if log_probs is None:
            raise ValueError(
                f"the cached reference knows {len(self)} sequences, but not all of this batch: run "
                "precompute_ref_log_probs over the data set that the batch comes from."
            )
        return log_probs

    def __or__(self, other: "CachedReference") -> "CachedReference":
        """What either of the two knows."""
        if self.per_token != other.per_token:
            raise ValueError(
                "two caches should hold the same kind of values, but one holds sums and the other single "
                "tokens: make both with the same per_token."
            )
        both = CachedReference(self.per_token)
        both.dtype = self.dtype
        both.values = self.values | other.values
        return both

    def explain(self) -> str:
        return f"log-probs of {len(self)} sequences, computed before"


class ModelReference(Reference):
    """A model that computes the reference's log-probs, with a cache of them where that is enabled.

    Attributes:
        shared: the parameters that should stay as they are, since the policy has them too.
        max_cached_length: length of the longest batch whose log-probs may be looked up in other batches.
    """

    description = "a frozen model"

    def __init__(self, scorer: Scorer, policy: nn.Module | None = None) -> None:
        self.scorer = scorer
        self.model = scorer.language_model.model
        self.shared = SharedWeights(nn.Module() if policy is None else policy, self.model)
        self.versions: dict[tuple[str, bool], Any] = {}
        self.max_cached_length = math.inf

    def enable_cache(self, per_token: bool) -> None:
        """Keep log-probs from now on, of batches in which they depend on nothing beside each sequence."""
        self.max_cached_length = max_independent_length(self.model)
        self.cache = LogProbCache(per_token) if self.max_cached_length else None
        if self.cache is None:
            warnings.warn(
                "cache_ref_log_probs has no effect, for the reference's log-probs of a sequence depend on "
                "its batch.",
                stacklevel=4,
            )

    def frozen(self) -> AbstractContextManager[None]:
        """The context in which the model is the reference; ValueError if it would not be what it was."""
        self.shared.check()
        return eval_mode(self.model)

    def weights(self) -> dict[str, Tensor]:
        """The weights that the log-probs depend on, by name."""
        return self.model.state_dict()

    def frozen_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the log-probs depend on, by name."""
        return dict(self.model.named_parameters())

    def forget_if_changed(self, cache: LogProbCache) -> None:
        """Empty the cache if a weight was replaced or written since the last call."""
        for name, p in (*self.frozen_parameters().items(), *saved_buffers(self.model)):
            # FSDP gathers a parameter for a time, which is no change
            form = (name, hasattr(p, "device_mesh"))
            version = (id(p), tensor_version(p), p.dtype, p.device)
            if self.versions.get(form, version) != version:
                cache.values.clear()
            self.versions[form] = version

    def __call__(self, sequences: ScoredSequences) -> SequenceLogProbs:
        if self.cache is None:
            return self.compute(sequences)
        self.forget_if_changed(self.cache)
        # autocast changes what the same weights compute
        device = sequences.ids.device.type
        state = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
        can_be_cached = sequences.ids.shape[1] <= self.max_cached_length
        if not can_be_cached:
            warnings.warn(
                f"reference log-probs of batches longer than {self.max_cached_length} tokens are not cached, "
                "for there those of a sequence depend on its batch.",
                stacklevel=3,
            )
        log_probs = self.cache.lookup(sequences, state) if can_be_cached else None
        is_known = is_true_everywhere(log_probs is not None, self.model)
        if log_probs is None or not is_known:
            log_probs = self.compute(sequences)
            if can_be_cached:
                self.cache.store(sequences, log_probs, state)
        return log_probs

    @torch.no_grad()
    def compute(self, sequences: ScoredSequences) -> SequenceLogProbs:
        """The log-probs of the sequences, from a forward pass of the model, on their device."""
        with self.frozen():
            if self.device is None:
                return self.scorer(sequences)
            log_probs = self.scorer(sequences.to(self.device))
        assert log_probs.tokens is not None
        return sequences.log_probs(log_probs.tokens.to(sequences.ids.device))

    def explain(self) -> str:
        return f"{self.description}; {self.scorer.explain()}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with an empty cache, since a cache belongs to these very parameters."""
        cache = None if self.cache is None else LogProbCache(self.cache.per_token)
        return vars(self) | {"versions": {}, "cache": cache}


class FrozenModel(ModelReference):
    """A model of the reference's own: a frozen copy of the policy, or a given module.

    Parameters that it shares with the policy should stay as they are. With a `device` it stays there.
    """

    def __init__(
        self, scorer: Scorer, policy: nn.Module | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__(scorer, policy)
        self.module, self.device = self.model, device


class AdapterDisabled(ModelReference):
    """The policy itself with its fresh PEFT adapter switched off."""

    description = "the policy with its adapter off"

    def __init__(self, scorer: Scorer) -> None:
        super().__init__(scorer, scorer.language_model.model)

    def weights(self) -> dict[str, Tensor]:
        return {n: value for n, value in self.model.state_dict().items() if not LORA_FACTOR.search(n)}

    def frozen_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in super().frozen_parameters().items() if not LORA_FACTOR.search(name)}

    @contextmanager
    def frozen(self) -> Iterator[None]:
        trains = [(p, p.requires_grad) for p in self.model.parameters()]
        policy: Any = self.model
        try:
            with super().frozen(), policy.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trains:  # PEFT unfreezes all of an adapter that it enables again
                parameter.requires_grad_(requires_grad)
