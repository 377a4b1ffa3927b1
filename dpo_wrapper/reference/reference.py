"""Where reference log-probs come from: a frozen model, the policy without its adapter, a cache, nowhere."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs
from dpo_wrapper.models.eval_mode import eval_mode
from dpo_wrapper.reference.cache import LogProbCache
from dpo_wrapper.reference.frozen_copy import copy_with_closures
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
    """A model that computes the reference's log-probs, with a cache of them where that is enabled."""

    description = "a frozen model"

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.model = scorer.language_model.model
        self.cache_fingerprint: Any = None

    def frozen(self) -> AbstractContextManager[None]:
        """The context in which the model is the reference."""
        return eval_mode(self.model)

    def weights(self) -> dict[str, Tensor]:
        """The weights that the log-probs depend on, by name."""
        return self.model.state_dict()

    def frozen_parameters(self) -> list[nn.Parameter]:
        """The parameters that the log-probs depend on."""
        return list(self.model.parameters())

    def __call__(self, sequences: ScoredSequences) -> SequenceLogProbs:
        if self.cache is None:
            return self.compute(sequences)
        # changes with the reference's weights and with the dtype that it computes in
        device = sequences.ids.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        weights = tuple((id(p), p._version, p.dtype, p.device) for p in self.frozen_parameters())
        fingerprint = (autocast, weights)
        if self.cache_fingerprint not in (None, fingerprint):
            self.cache.values.clear()
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

    def explain(self) -> str:
        return f"{self.description}; {self.scorer.explain()}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with an empty cache, since a cache belongs to these very parameters."""
        cache = None if self.cache is None else LogProbCache(self.cache.per_token)
        return vars(self) | {"cache_fingerprint": None, "cache": cache}


class FrozenModel(ModelReference):
    """A model of the reference's own: a frozen copy of the policy, or a given module.

    Parameters that it shares with the policy should stay frozen. With a `device` it stays there.
    """

    def __init__(
        self, scorer: Scorer, policy: nn.Module | None = None, device: torch.device | None = None
    ) -> None:
        super().__init__(scorer)
        self.module, self.device = self.model, device
        reference_ids = {id(p) for p in self.model.parameters()}
        named = [] if policy is None else policy.named_parameters()
        self.shared = [(name, p) for name, p in named if id(p) in reference_ids]

    def frozen(self) -> AbstractContextManager[None]:
        """As in `ModelReference`; ValueError if a parameter that the policy shares trains by now."""
        for name, parameter in self.shared:
            if parameter.requires_grad:
                raise ValueError(
                    f"{name} was frozen when DPO was made, so policy and reference share it, but now it "
                    "trains: choose what trains before making DPO."
                )
        return super().frozen()


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
        trains = [(p, p.requires_grad) for p in self.model.parameters()]
        policy: Any = self.model
        try:
            with super().frozen(), policy.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trains:  # PEFT unfreezes all of an adapter that it enables again
                parameter.requires_grad_(requires_grad)


class ReferenceOwner(nn.Module):
    """A module that owns a reference beside its policy, and moves and copies the two rightly."""

    reference: Reference
    ref_model: nn.Module | None  # the reference's own

    def set_reference(self, reference: Reference) -> None:
        self.reference, self.ref_model = reference, reference.module
        # DistributedDataParallel wants all tensors that it synchronizes on one device
        is_apart = reference.device is not None
        names = [name for name, _ in (*self.named_parameters(), *self.named_buffers()) if is_apart]
        self._ddp_params_and_buffers_to_ignore = [name for name in names if name.startswith("ref_model.")]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to()` and its relatives do; a reference with a device of its own is cast but stays there."""
        ref_model = self.ref_model
        if ref_model is None or self.reference.device is None:
            return super()._apply(fn, recurse)

        def cast(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.device == tensor.device else tensor.to(result.dtype)

        self.ref_model = None
        try:
            super()._apply(fn, recurse)
        finally:
            self.ref_model = ref_model
        ref_model._apply(cast)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """Replicas would go on using this module's models, since scorers hold these as they are."""
        raise TypeError(
            f"{type(self).__name__} should run once per process, but it is inside DataParallel: wrap it in "
            "DistributedDataParallel."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy whose policy reads no weights but its own, with a tied head in x-transformers too."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy_with_closures(self.__dict__, self, memo))
        return twin
