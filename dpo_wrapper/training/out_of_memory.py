"""Memory that does not suffice, in one sentence with what helps."""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.stopping import TrainingError

MESSAGES = re.compile(
    "can't allocate memory|cannot allocate memory|not enough memory|out of memory|unable to mmap|"
    "std::bad_alloc|ALLOC_FAILED",
    re.IGNORECASE,
)
"""What torch, CUDA, its libraries and the operating system say of memory, in errors of any class."""

SIZE = re.compile(r"tried to allocate ([\d.]+) ?([KMG]iB|bytes)", re.IGNORECASE)
BYTES = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, of the machine or of an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    is_other = not isinstance(error, (RuntimeError, OSError)) and "safetensors" not in type(error).__module__
    if is_other or isinstance(error, TrainingError):
        return False
    return getattr(error, "errno", None) == errno.ENOMEM or MESSAGES.search(str(error)) is not None


@contextmanager
def explain_out_of_memory(what: str, advise: Callable[[], str]) -> Iterator[None]:
    """The context in which errors of memory become a TrainingError.

    Args:
        what: is computed, in words.
        advise: says what helps, in the imperative.
    """
    try:
        yield
    except Exception as error:  # each library has a class of its own
        if not is_out_of_memory(error):
            raise
        size = SIZE.search(str(error))
        tried = f" ({float(size[1]) * BYTES[size[2].lower()] / 1e9:.2g} GB more)" if size else ""
        raise TrainingError(
            f"{what} should fit in memory, but it needs more than there is{tried}: {advise()}."
        ) from error


def advise_on_steps(config: TrainConfig, batches: Sequence[Any] = (), *, trains: bool = True) -> str:
    """What makes a forward pass smaller, and with `trains` the backward pass as well.

    `batches` are the micro-batches that did not fit, where they are known.
    """
    is_one_example = bool(batches) and all(len(batch.sequences.length) <= 2 for batch in batches)
    limits = [config.micro_batch_tokens, *([max(map(count_tokens_at_once, batches))] if batches else [])]
    checkpoints = trains and not config.gradient_checkpointing and not config.is_new_model
    advice = [] if is_one_example else [f"lower --micro-batch-tokens to {min(limits) // 2}"]
    advice += ["add --gradient-checkpointing"] if checkpoints else []
    advice += ["train a smaller model or shorter rows (--max-length)"] if not advice else []
    return f"{' or '.join(advice)}, and --resume continues from the last checkpoint, which is whole"


def count_tokens_at_once(batch: Any) -> int:
    """The tokens of a micro-batch, as --micro-batch-tokens counts them: of its tree, or of padded rows."""
    sequences = batch.sequences
    return int(sequences.unique_tokens() if sequences.has_tree else sequences.ids.numel())


def advise_on_weights(config: TrainConfig) -> str:
    """What makes the weights, and what is kept beside them, smaller."""
    advice = ["take a smaller model"]
    advice += [] if config.has_adapter or config.is_new_model else ["train an adapter (--lora)"]
    advice += ["load its weights in 16 bits (--dtype bfloat16)"] if config.dtype == "auto" else []
    return " or ".join([", ".join(advice[:-1]), advice[-1]]) if advice[1:] else advice[0]
