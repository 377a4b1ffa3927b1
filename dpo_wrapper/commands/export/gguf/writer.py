"""`--to gguf`: a file of the whole model, or of its adapter alone."""

from pathlib import Path

from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Exported
from dpo_wrapper.commands.export.gguf import model_file
from dpo_wrapper.commands.export.gguf.adapter import write_gguf_adapter
from dpo_wrapper.commands.export.source import ExportSource


def write_gguf(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write one GGUF file, with what loads it back here.

    Raises:
        ValueError: llama.cpp does not know the model, its tokenizer or its adapter.
        ImportError: a library or program that is needed is missing.
    """
    write = write_gguf_adapter if config.adapter else model_file.write_gguf
    return write(source, folder, config)
