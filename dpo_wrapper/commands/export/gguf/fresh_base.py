"""An adapter in llama.cpp, on a GGUF file of its base that is written for that alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from dpo_wrapper.commands.export.agreement import TOLERANCES, UnreadableError
from dpo_wrapper.commands.export.exported import Check
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import LlamaCppReader, check_by_llama_cpp
from dpo_wrapper.commands.export.gguf.model_file import write_base_gguf
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.tokens.tokenizers import Tokenizer


class FreshBaseReader(LlamaCppReader):
    """An adapter in llama.cpp, on its base in float32, whose file goes when this is closed.

    Args:
        file: the adapter.
        load_base: gives transformers' model of the base.
        tokenizer: its tokenizer.
        context: as in `LlamaCppReader`.

    Raises:
        ExportError: llama.cpp does not load the adapter.
        UnreadableError: no file of the base can be written here.
    """

    def __init__(
        self, file: Path, load_base: Callable[[], nn.Module], tokenizer: Tokenizer, context: int
    ) -> None:
        self._folder = TemporaryDirectory(dir=file.parent)
        base = Path(self._folder.name) / "base.gguf"
        try:
            write_base_gguf(load_base(), tokenizer, base, "float32")
            super().__init__(base, context, file)
        except BaseException as error:
            self._folder.cleanup()
            if isinstance(error, ValueError):
                raise UnreadableError(
                    f"llama.cpp has not tried it, as no GGUF file of the base can be written here ({error}): "
                    "name one by --base."
                ) from error
            raise
        self.name = "llama.cpp, on a float32 GGUF file of the base that was written for this and is gone"

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


def check_on_fresh_base(file: Path, load_base: Callable[[], nn.Module], source: ExportSource) -> Check:
    """A check of an adapter by llama-cpp-python; where it is not installed, what to install."""
    check = check_by_llama_cpp(file, source.outputs, TOLERANCES["float32"])
    if check.open_reader is None:
        return check
    context = max(len(output.ids) for output in source.outputs)
    return replace(check, open_reader=lambda: FreshBaseReader(file, load_base, source.tokenizer, context))
