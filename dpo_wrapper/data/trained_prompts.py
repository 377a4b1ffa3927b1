"""Which prompts a model was trained on: a file of their hashes beside it, 8 bytes each."""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.data.whole_files import write_whole

TRAINED_PROMPTS_FILE = "trained_prompts.npy"  # vLLM takes all .safetensors beside a model for weights

PromptDigests = NDArray[np.uint64]
"""Hashes by `prompt_digest`."""


def write_trained_prompts(folder: Path, digests: PromptDigests) -> None:
    """Write the file to the folder of a model, completely or not at all."""
    content = BytesIO()
    np.save(content, digests.astype("<u8"), allow_pickle=False)
    write_whole(folder / TRAINED_PROMPTS_FILE, content.getvalue())


def read_trained_prompts(folder: Path) -> PromptDigests | None:
    """What the folder of a model says; None if it does not say, or there is no such folder.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / TRAINED_PROMPTS_FILE
    if not file.is_file():
        return None
    problem = f"{file} should hold the hashes of the prompts that the model was trained on, but "
    try:
        digests = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{problem}it cannot be read ({error}): put it back, or remove it.") from error
    if digests.dtype != np.uint64 or digests.ndim != 1:
        raise ValueError(f"{problem}it holds something else: put it back, or remove it.")
    return digests
