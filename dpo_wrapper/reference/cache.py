"""Log-probs that were computed before, looked up by the content of sequences."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs

HASH_BYTES = 16


class LogProbCache:
    """For each sequence, by its content hash, the sum of its log-probs or, with `per_token`, each of them.

    The batch that a sequence stands in and its padding do not matter. What `state` names does: log-probs that
    are kept under one state are not found under another.

    Attributes:
        is_shared: whether every process knows what this one does.
    """

    def __init__(self, per_token: bool = False) -> None:
        self.per_token = per_token
        self.values: dict[bytes, Any] = {}
        self.dtype = torch.float32
        self.is_shared = False

    def __len__(self) -> int:
        return len(self.values)

    def lookup(self, sequences: ScoredSequences, state: str = "") -> SequenceLogProbs | None:
        """The log-probs of the sequences; None unless all of them are known."""
        values: list[Any] = [self.values.get(key) for key in cache_keys(sequences, state)]
        if any(value is None for value in values):
            return None
        if self.per_token:
            return sequences.log_probs(torch.cat(values).to(sequences.ids.device))
        return SequenceLogProbs(torch.tensor(values, dtype=self.dtype, device=sequences.ids.device))

    def store(self, sequences: ScoredSequences, log_probs: SequenceLogProbs, state: str = "") -> None:
        """Keep the log-probs of the sequences. A sequence that is known keeps the value it has."""
        values = log_probs.tokens if self.per_token else log_probs.sums
        assert values is not None
        values = values.detach().cpu()
        self.dtype = values.dtype
        split = values.split(sequences.length.tolist()) if self.per_token else values.tolist()
        for key, value in zip(cache_keys(sequences, state), split, strict=True):
            self.is_shared = self.is_shared and key in self.values
            self.values.setdefault(key, value.clone() if self.per_token else value)

    def state_dict(self) -> dict[str, Tensor]:
        """All content hashes and values, as tensors for a file."""
        hashes, values = b"".join(self.values), list(self.values.values())
        lengths = [len(value) if self.per_token else 1 for value in values]
        flat = torch.cat(values) if self.per_token and values else torch.tensor(values, dtype=self.dtype)
        return {
            "hashes": torch.tensor(list(hashes), dtype=torch.uint8),
            "lengths": torch.tensor(lengths, dtype=torch.long),
            "values": flat,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Add what the state holds to what is known."""
        hashes = [bytes(row) for row in state["hashes"].view(-1, HASH_BYTES).numpy()]
        values: Any = state["values"].cpu()
        if len(values):
            self.dtype = values.dtype
        values = values.split(state["lengths"].tolist()) if self.per_token else values.tolist()
        for content, value in zip(hashes, values, strict=True):
            self.values.setdefault(content, value)

    def gather_from_processes(self) -> None:
        """Share what every process knows with all others.

        Of a sequence that several know, all take the value of the first, so that a checkpoint holds it once.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, self.state_dict())
            self.values = {}
            for state in states:
                self.load_state_dict(state)
            self.is_shared = True


def cache_keys(sequences: ScoredSequences, state: str) -> tuple[bytes, ...]:
    """The key of each sequence: its content hash, or one of content and state."""
    hashes = sequences.content_hashes()
    if not state:
        return hashes
    return tuple(hashlib.blake2b(h + state.encode(), digest_size=HASH_BYTES).digest() for h in hashes)
