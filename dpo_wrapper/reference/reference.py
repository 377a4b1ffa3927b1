"""Where reference log-probs come from: a frozen model, the policy without its adapter, a cache, nowhere."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs
from dpo_wrapper.models.eval_mode import eval_mode
from dpo_wrapper.reference.cache import CachedReference, LogProbCache
from dpo_wrapper.scoring.scorer import Scorer


class Reference(ABC):
    """Computes the reference's log-probs of sequences.

    Attributes:
        module: the reference's own model; None where there is none.
        device: where the reference stays, whatever device the policy moves to; None if it moves along.
        cache: log-probs that were computed before, where they are kept in memory.
    """

    module: nn.Module | None = None
    device: torch.device | None = None
    cache: LogProbCache | None = None

    @abstractmethod
    def __call__(self, sequences: ScoredSequences) -> SequenceLogProbs | None:
        """The log-probs of the sequences, without gradients; None where there is no reference."""

    @abstractmethod
    def explain(self) -> str:
        """What the reference is and which paths it takes, in plain words."""


class NoReference(Reference):
    """For losses that need no reference."""

    def __call__(self, sequences: ScoredSequences) -> None:
        return None

    def explain(self) -> str:
        return "none"


class StoredReference(Reference):
    """Log-probs that `precompute_ref_log_probs` has computed, and no model."""

    def __init__(self, stored: CachedReference) -> None:
        self.stored = stored

    def __call__(self, sequences: ScoredSequences) -> SequenceLogProbs:
        return self.stored.log_probs(sequences)

    def explain(self) -> str:
        return f"log-probs of {len(self.stored)} sequences, computed before"


class ModelReference(Reference):
    """A model that computes the reference's log-probs, with a cache of them where that is enabled."""

    description: ClassVar[str] = "a frozen model"

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.model = scorer.language_model.model
        self.cache_fingerprint: Any = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The context in which the model is the reference."""
        with eval_mode(self.model):
            yield

    def weights(self) -> dict[str, Tensor]:
        """The weights that the log-probs depend on, by name."""
        return self.model.state_dict()

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The parameters that the log-probs depend on."""
        return list(self.model.parameters())

    def enable_cache(self, per_token: bool) -> None:
        """Keep log-probs in memory, so that each sequence is computed once as long as the weights stay."""
        self.cache = LogProbCache(per_token)

    def __call__(self, sequences: ScoredSequences) -> SequenceLogProbs:
        if self.cache is None:
            return self.compute(sequences)
        fingerprint = self.fingerprint(sequences.ids.device)
        if self.cache_fingerprint not in (None, fingerprint):
            self.cache.clear()
        self.cache_fingerprint = fingerprint
        log_probs = self.cache.lookup(sequences)
        if log_probs is None:
            log_probs = self.compute(sequences)
            self.cache.store(sequences, log_probs)
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

    def fingerprint(self, device: torch.device) -> Any:
        """A value that changes with the reference's weights and with the dtype that it computes in."""
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return autocast, tuple((id(p), p._version, p.dtype, p.device) for p in self.frozen_parameters())

    def explain(self) -> str:
        return f"{self.description}; {self.scorer.explain()}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with an empty cache, since a cache belongs to these very parameters."""
        cache = None if self.cache is None else LogProbCache(self.cache.per_token)
        return vars(self) | {"cache_fingerprint": None, "cache": cache}


class FrozenModel(ModelReference):
    """A model of the reference's own: a frozen copy of the policy, or a given module.

    Args:
        policy: the parameters that policy and reference share should stay frozen.
        device: where the model stays, if it does not move with the policy.
    """

    def __init__(
        self, scorer: Scorer, policy: nn.Module | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__(scorer)
        self.module, self.device = self.model, device
        own = {id(p) for p in self.model.parameters()}
        named = [] if policy is None else list(policy.named_parameters())
        self.shared = [(name, p) for name, p in named if id(p) in own]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """As in `ModelReference`; ValueError if a parameter that the policy shares trains by now."""
        for name, parameter in self.shared:
            if parameter.requires_grad:
                raise ValueError(
                    f"{name} was frozen when DPO was made, so policy and reference share it, but now it "
                    "trains: choose what trains before making DPO."
                )
        with super().frozen():
            yield

    def ddp_ignored_names(self, prefix: str) -> list[str]:
        """Parameters and buffers on a device of their own, which DistributedDataParallel should ignore."""
        if self.device is None:
            return []
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return [f"{prefix}.{name}" for name, _ in tensors]

    def apply_cast(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply the cast, but not the move, of what `DPO.to()` does to tensors."""

        def cast(tensor: Tensor) -> Tensor:
            result = function(tensor)
            return result if result.device == tensor.device else tensor.to(result.dtype)

        self.model._apply(cast)


class AdapterDisabled(ModelReference):
    """The policy itself with its fresh PEFT adapter switched off."""

    description = "the policy with its adapter off"

    def weights(self) -> dict[str, Tensor]:
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if name not in trained}

    def frozen_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if not p.requires_grad]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The context in which the adapter is off."""
        trains = [(p, p.requires_grad) for p in self.model.parameters()]
        policy: Any = self.model
        try:
            with super().frozen(), policy.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trains:  # PEFT unfreezes all of an adapter that it enables again
                parameter.requires_grad_(requires_grad)
