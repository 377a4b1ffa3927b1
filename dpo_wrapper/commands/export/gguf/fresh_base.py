"""An adapter in llama.cpp, on a GGUF file of its base that is written for that alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from dpo_wrapper.commands.export.agreement import PromptOutput, UnreadableError
from dpo_wrapper.commands.export.exported import Check
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import LlamaCppReader, check_by_llama_cpp
from dpo_wrapper.commands.export.gguf.model_file import write_base_gguf
from dpo_wrapper.data.tokens.tokenizers import Tokenizer


class FreshBaseReader(LlamaCppReader):
    """An adapter in llama.cpp, on its base in float32, whose file goes when this is closed.

    Args:
        adapter: the file.
        load_base: gives transformers' model of the base.
        tokenizer: its tokenizer.
        context: as in `LlamaCppReader`.

    Raises:
        ExportError: llama.cpp does not load the adapter.
        UnreadableError: no file of the base can be written here.
    """

    def __init__(
        self, adapter: Path, load_base: Callable[[], nn.Module], tokenizer: Tokenizer, context: int
    ) -> None:
        self._folder = TemporaryDirectory(dir=adapter.parent)
        base = Path(self._folder.name) / "base.gguf"
        try:
            self._write_base(load_base(), tokenizer, base)
            super().__init__(base, context, adapter)
        except BaseException:
            self._folder.cleanup()
            raise
        self.name = "llama.cpp, on a float32 GGUF file of the base that was written for this and is gone"

    def _write_base(self, base: nn.Module, tokenizer: Tokenizer, file: Path) -> None:
        try:
            write_base_gguf(base, tokenizer, file, "float32")
        except ValueError as error:
            raise UnreadableError(
                "llama.cpp has not tried it in float32, as no GGUF file of the base can be written here "
                f"({error})"
            ) from error

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


def check_on_fresh_base(
    adapter: Path,
    load_base: Callable[[], nn.Module],
    tokenizer: Tokenizer,
    outputs: Sequence[PromptOutput],
    tolerance: float,
) -> Check:
    """A check of an adapter by llama-cpp-python, without what llama.cpp rounds beside quantized weights.

    Where it is not installed, the check says what to install.
    """
    check = check_by_llama_cpp(adapter, outputs, tolerance, expected=outputs)
    if check.open_reader is None:
        return check
    context = max(len(output.ids) for output in outputs)
    return replace(check, open_reader=lambda: FreshBaseReader(adapter, load_base, tokenizer, context))
