"""Where reference log-probs come from: a frozen copy, a given module, the policy without adapter, nowhere."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.models.eval_mode import eval_mode
from dpo_wrapper.reference.cache import CachedReference, Recall
from dpo_wrapper.reference.frozen_copy import frozen_copy
from dpo_wrapper.scoring.scorer import Scorer

KINDS = ("auto", "copy", "adapter", "none")
FACTOR = re.compile(r"lora_(embedding_)?[AB]\.")


def adapter_is_idle(policy: nn.Module) -> bool:
    """Whether all that trains is a PEFT LoRA adapter that does nothing yet: off, it leaves the reference."""
    if not (hasattr(policy, "peft_config") and hasattr(policy, "disable_adapter")):
        return False
    # of the two factors PEFT starts B at zero, for embeddings A; beside them DoRA trains magnitudes
    zeros = [p for name, p in policy.named_parameters() if "lora_B." in name or "lora_embedding_A." in name]
    alone = all(FACTOR.search(name) for name, p in policy.named_parameters() if p.requires_grad)
    return bool(zeros) and alone and not any(p.detach().any() for p in zeros)


def place(device: object) -> torch.device:
    """A device by its name; with an index, as tensors there have it."""
    try:
        return torch.empty(0, device=torch.device(device)).device  # type: ignore[call-overload]
    except (RuntimeError, AssertionError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"reference_device should be a device of this machine, like 'cpu', but it is {device!r}: {first}"
        ) from error


class Reference:
    """The model that stays still, and the ways in which it could fail to.

    `module` is None where the policy itself serves (adapter off) or where there is no reference.
    """

    def __init__(
        self,
        policy: nn.Module,
        kind: str | nn.Module | CachedReference,
        needed: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(kind, (str, nn.Module, CachedReference)) or (
            isinstance(kind, str) and kind not in KINDS
        ):
            raise ValueError(
                f"reference should be a module or one of {', '.join(KINDS)}, but it is {kind!r}."
            )
        if kind == "auto":
            kind = "none" if not needed else "adapter" if adapter_is_idle(policy) else "copy"
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"reference_dtype should be a torch dtype of floats, but it is {dtype!r}.")
        for option, given in (("reference_dtype", dtype), ("reference_device", device)):
            if given is not None and not (isinstance(kind, str) and kind == "copy"):
                which = repr(kind) if isinstance(kind, str) else "given"
                raise ValueError(
                    f"{option} is for reference = 'copy', but it is {which}: leave it out, and convert or "
                    "move a module of your own by module.to(...)."
                )
        self.device = None if device is None else place(device)
        self.adapter_of: Any = None
        self.module: nn.Module | None = None
        self.shared: list[tuple[str, nn.Parameter]] = []
        self.cached = kind if isinstance(kind, CachedReference) else None
        self.memory: Recall | None = None
        self.remembered_of: Any = None
        if isinstance(kind, nn.Module):
            self.module = self.given(kind, policy)
        elif kind == "adapter":
            if not adapter_is_idle(policy):
                raise ValueError(
                    "reference = 'adapter' switches a fresh PEFT LoRA adapter off, but this policy has none, "
                    "or one that is already trained, or trains other weights as well: use reference = 'copy'."
                )
            self.adapter_of = policy
        elif kind == "copy":
            self.module = frozen_copy(policy, dtype, self.device)
        if self.module is not None:
            own = {id(p) for p in self.module.parameters()}
            self.shared = [(name, p) for name, p in policy.named_parameters() if id(p) in own]

    @property
    def exists(self) -> bool:
        return self.module is not None or self.adapter_of is not None or self.cached is not None

    def recalls(self, *, per_token: bool, remembers: bool) -> None:
        """Say whether single tokens will be asked for, and whether to remember what is computed."""
        if self.cached is not None and per_token and not self.cached.per_token:
            raise ValueError(
                "ld_alpha needs the reference's log-prob of each token, but the cache holds sums: make it "
                "with cache_reference(..., token_scores = True)."
            )
        if remembers and self.exists and self.cached is None:
            self.memory = Recall(per_token)

    def explain(self, score: Scorer) -> str:
        if self.cached is not None:
            return f"log-probs of {len(self.cached)} sequences, computed before"
        which = "the policy with its adapter off" if self.module is None else "a frozen model"
        return f"{which}; {score.explain()}"

    def sums(self, score: Scorer, sequences: ScoredSequences) -> Float[Tensor, "s"] | None:
        """The log-prob of each sequence; None where there is no reference."""
        known = self.known(sequences)
        if known is not None:
            store = self.memory if self.cached is None else self.cached
            return sequences.sums(known) if store is not None and store.per_token else known
        scores = self.computed(score, sequences)
        sums = None if scores is None else sequences.sums(scores)
        self.remember(sequences, scores, sums)
        return sums

    def token_scores(self, score: Scorer, sequences: ScoredSequences) -> Float[Tensor, "t"] | None:
        """The log-prob of each scored token; None where there is no reference."""
        known = self.known(sequences)
        if known is not None:
            return known
        scores = self.computed(score, sequences)
        self.remember(sequences, scores, None)
        return scores

    @torch.no_grad()
    def computed(self, score: Scorer, sequences: ScoredSequences) -> Float[Tensor, "t"] | None:
        if not self.exists:
            return None
        here = sequences.ids.device
        sequences = sequences if self.device is None else sequences.to(self.device)
        with self.still():
            score.check(sequences)
            return score.token_scores(sequences).to(here)

    def apart(self, prefix: str) -> list[str]:
        """Names of what has a device of its own: DDP takes no module on two kinds of devices."""
        if self.device is None or self.module is None:
            return []
        own = [*self.module.named_parameters(), *self.module.named_buffers()]
        return [f"{prefix}.{name}" for name, _ in own]

    def applied(self, function: Callable[[Tensor], Tensor]) -> None:
        """What a move or cast of `DPO` does to a reference with a device of its own: the cast alone."""
        assert self.module is not None

        def cast(tensor: Tensor) -> Tensor:
            result = function(tensor)
            return result if result.device == tensor.device else tensor.to(result.dtype)

        self.module._apply(cast)

    def known(self, sequences: ScoredSequences) -> Float[Tensor, "_"] | None:
        """What was computed before: of each scored token, or of each sequence."""
        if self.cached is not None:
            return self.cached.of(sequences)
        if self.memory is None:
            return None
        now = self.state(sequences.ids.device)
        if self.remembered_of not in (None, now):
            self.memory.clear()
        self.remembered_of = now
        return self.memory.find(sequences)

    def remember(self, sequences: ScoredSequences, scores: Tensor | None, sums: Tensor | None) -> None:
        if self.memory is not None and (values := scores if self.memory.per_token else sums) is not None:
            self.memory.keep(sequences, values)

    def state(self, device: torch.device) -> Any:
        """Changes with the reference's weights and with what it computes in."""
        of = self.module if self.module is not None else self.adapter_of
        weights = [p for p in of.parameters() if self.module is not None or not p.requires_grad]
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return autocast, tuple((id(p), p._version, p.dtype, p.device) for p in weights)

    def __getstate__(self) -> dict[str, Any]:
        """What is remembered is of the parameters of this one, and is left out of copies."""
        memory = None if self.memory is None else Recall(self.memory.per_token)
        return vars(self) | {"remembered_of": None, "memory": memory}

    @staticmethod
    def given(module: nn.Module, policy: nn.Module) -> nn.Module:
        trained = {id(p) for p in policy.parameters() if p.requires_grad}
        if module is policy or any(id(p) in trained for p in module.parameters()):
            raise ValueError(
                "the given reference shares trained parameters with the policy and would follow it: "
                "use reference = 'copy'."
            )
        return module.requires_grad_(False).eval()

    @contextmanager
    def still(self) -> Iterator[None]:
        """The context in which the reference is computed; raises if a shared parameter has begun to train."""
        for name, parameter in self.shared:
            if parameter.requires_grad:
                raise ValueError(
                    f"{name} was frozen when DPO was made, so policy and reference share it, but now it "
                    "trains: choose what trains before making DPO."
                )
        if self.adapter_of is None:
            yield
            return
        trains = [(p, p.requires_grad) for p in self.adapter_of.parameters()]
        try:
            with eval_mode(self.adapter_of), self.adapter_of.disable_adapter():
                yield
        finally:
            for parameter, flag in trains:  # PEFT lets all of an adapter train that it switches on again
                parameter.requires_grad_(flag)
