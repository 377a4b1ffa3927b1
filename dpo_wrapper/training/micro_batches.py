"""The micro-batches of an optimizer step, as a worker process makes them and hands them over."""

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.collate import group_by_tokens

CollateFn = Callable[[Sequence[TokenizedExample]], Any]


class MicroBatches(list[Any]):
    """Batches that a worker hands to the main process as one string of bytes.

    By itself torch hands each tensor over in shared memory of its own, by a file descriptor. A step of 64
    micro-batches has 1,000 tensors and more, and a process may have 1,024 descriptors.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        _TensorPickler(buffer, pickle.HIGHEST_PROTOCOL).dump(list(self))
        return _unpickle_micro_batches, (buffer.getvalue(),)

    def pin_memory(self) -> "MicroBatches":
        """Return a copy in page-locked memory. A `DataLoader` with `pin_memory=True` calls this."""
        return MicroBatches(batch.pin_memory() for batch in self)


class _TensorPickler(pickle.Pickler):
    """Pickles tensors on the CPU as numpy arrays, their bytes where they stand."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _unpickle_micro_batches(content: bytes) -> MicroBatches:
    return MicroBatches(pickle.loads(content))


def make_micro_batches(
    examples: Sequence[TokenizedExample],
    collate_fn: CollateFn,
    max_tokens: int,
    is_padded: bool,
    indices: list[int],
) -> MicroBatches:
    """The examples at some indices, in batches by `group_by_tokens`."""
    chosen = [examples[index] for index in indices]
    groups = group_by_tokens(chosen, max_tokens, is_padded=is_padded)
    return MicroBatches(collate_fn([chosen[k] for k in group]) for group in groups)
