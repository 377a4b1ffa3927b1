"""Log-probs that were computed before, found again by the sequences that they are of."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_wrapper.batches.sequences import ScoredSequences

NAME_BYTES = 16


class Recall:
    """By the name of a sequence (`ScoredSequences.names`): the sum of its scores or, `per_token`, every one.

    It does not matter which batch a sequence stands in, nor where its padding is.
    """

    def __init__(self, per_token: bool = False) -> None:
        self.per_token = per_token
        self.values: dict[bytes, Any] = {}
        self.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.values)

    def find(self, sequences: ScoredSequences) -> Float[Tensor, "_"] | None:
        """One value per scored token (or per sequence) if all of the sequences are known, else None."""
        found: list[Any] = [self.values.get(name) for name in sequences.names()]
        if any(value is None for value in found):
            return None
        if self.per_token:
            return torch.cat(found).to(sequences.ids.device)
        return torch.tensor(found, dtype=self.dtype, device=sequences.ids.device)

    def keep(self, sequences: ScoredSequences, values: Float[Tensor, "_"]) -> None:
        """Values as `find` gives them. A sequence that is known already keeps what it has."""
        values = values.detach().cpu()
        self.dtype = values.dtype
        split = values.split(sequences.length.tolist()) if self.per_token else values.tolist()
        for name, value in zip(sequences.names(), split, strict=True):
            self.values.setdefault(name, value.clone() if self.per_token else value)

    def clear(self) -> None:
        self.values.clear()

    def state_dict(self) -> dict[str, Tensor]:
        names = torch.frombuffer(bytearray(b"".join(self.values)), dtype=torch.uint8) if self.values else None
        lengths = [len(value) if self.per_token else 1 for value in self.values.values()]
        parts = [*self.values.values()]
        values = torch.cat(parts) if self.per_token and parts else torch.tensor(parts, dtype=self.dtype)
        return {
            "names": torch.zeros(0, dtype=torch.uint8) if names is None else names,
            "lengths": torch.tensor(lengths, dtype=torch.long),
            "values": values,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Adds what the state holds to what is known."""
        raw = state["names"].numpy().tobytes()
        names = [raw[start : start + NAME_BYTES] for start in range(0, len(raw), NAME_BYTES)]
        values: Any = state["values"].cpu()
        if len(values):
            self.dtype = values.dtype
        values = values.split(state["lengths"].tolist()) if self.per_token else values.tolist()
        for name, value in zip(names, values, strict=True):
            self.values.setdefault(name, value)

    def exchange(self) -> None:
        """Let every process know what the others know."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, self.state_dict())
            for state in states:
                self.load_state_dict(state)


class CachedReference(Recall):
    """The reference's log-probs of the sequences of data sets, as `cache_reference` gives them.

    `DPO(model, reference = cached)` needs no model for the reference.
    """

    def of(self, sequences: ScoredSequences) -> Float[Tensor, "_"]:
        """One value per scored token or per sequence; ValueError if a sequence is not known."""
        found = self.find(sequences)
        if found is None:
            raise ValueError(
                f"the cached reference knows {len(self)} sequences, but not all of this batch: run "
                "cache_reference over the data set that the batch comes from."
            )
        return found

    def __or__(self, other: "CachedReference") -> "CachedReference":
        """What either of two knows."""
        if self.per_token != other.per_token:
            raise ValueError("one cache holds sums and the other single tokens: make both alike.")
        both = CachedReference(self.per_token)
        both.dtype = self.dtype
        both.values = self.values | other.values
        return both
