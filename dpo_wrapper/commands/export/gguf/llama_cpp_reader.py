"""GGUF files as llama.cpp reads them, by llama-cpp-python."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dpo_wrapper.commands.export.agreement import ExportError, Logits, PromptOutput
from dpo_wrapper.commands.export.exported import Check


class LlamaCppReader:
    """A GGUF file in llama.cpp on the CPU, with keys and values in float32.

    Args:
        file: the model.
        context: the largest number of tokens of a sequence.
        lora_path: an adapter that is applied to it.

    Raises:
        ExportError: llama.cpp does not load a file.
    """

    def __init__(self, file: Path, context: int, lora_path: Path | None = None) -> None:
        import llama_cpp

        self.name = "llama.cpp"
        try:
            self._llama: Any = llama_cpp.Llama(
                model_path=str(file),
                n_ctx=context,
                n_batch=context,
                n_threads=1,
                n_threads_batch=1,
                logits_all=True,
                type_k=llama_cpp.GGML_TYPE_F32,
                type_v=llama_cpp.GGML_TYPE_F32,
                swa_full=False,
                lora_path=None if lora_path is None else str(lora_path),
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            failed = lora_path if isinstance(error, RuntimeError) else file
            raise ExportError(
                f"llama.cpp should load {failed}, but it does not ({error}): do not use it."
            ) from error

    def compute_logits(self, ids: Sequence[int]) -> Logits:
        self._llama.reset()
        self._llama.eval(list(ids))
        return np.array(self._llama.scores[: len(ids)])

    def tokenize(self, text: str) -> list[int]:
        """As llama.cpp's programs do it: a BOS that stands in the text is not put in front once more."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=True, special=True)
        bos = self._llama.token_bos()
        return ids[1:] if ids[:2] == [bos, bos] else ids

    def close(self) -> None:
        self._llama.close()


def check_by_llama_cpp(
    file: Path,
    outputs: Sequence[PromptOutput],
    tolerance: float,
    *,
    lora_path: Path | None = None,
    expected: Sequence[PromptOutput] | None = None,
) -> Check:
    """A check by llama-cpp-python; where it is not installed, what to install.

    Args:
        file: the model.
        outputs: what sets the length of the context.
        tolerance: as in `Check`.
        lora_path: an adapter that is applied to it.
        expected: as `outputs` in `Check`.
    """
    if find_spec("llama_cpp") is None:
        missing = "llama.cpp has not read it, as llama-cpp-python is missing: pip install llama-cpp-python."
        return Check(None, tolerance, missing)
    context = max(len(output.ids) for output in outputs)
    return Check(
        lambda: LlamaCppReader(file, context, lora_path),
        tolerance,
        outputs=None if expected is None else tuple(expected),
    )
