"""What a form of export asks of a model: it is refused before the model is asked and anything is written."""

from collections.abc import Callable
from typing import Any

from dpo_wrapper.commands.export.config import ExportConfig, Format
from dpo_wrapper.commands.export.gguf.adapter_file import check_adapter
from dpo_wrapper.commands.export.gguf.keys import check_model
from dpo_wrapper.commands.export.lora_factors import list_lora_factors
from dpo_wrapper.commands.export.mlx import check_mlx_takes, find_folder
from dpo_wrapper.commands.export.ollama.writer import describe
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer


def check_requirements(source: ExportSource, form: Format, config: ExportConfig) -> None:
    """Raise ValueError or ImportError if a model cannot be exported in a form, as far as that is known now.

    Writers raise the rest: what only the weights tell.
    """
    if form == "x-transformers" and source.kind != "x_transformers":
        raise ValueError(
            f"--to x-transformers should be given for a model of x-transformers, but {source.name} is one of "
            "Hugging Face: use --to merged."
        )
    if form != "x-transformers" and source.kind == "x_transformers":
        raise ValueError(
            f"--to {form} should be given for a Hugging Face model, but {source.name} is one of "
            "x-transformers: use --to x-transformers."
        )
    if form == "peft":
        source.require_adapter(form)
    check = FURTHER.get(form)
    if check is not None:
        check(source, config)


def check_mlx(source: ExportSource, config: ExportConfig) -> None:
    model: Any = source.pretrained.model
    base = find_folder(source.require_adapter("mlx").base)
    check_mlx_takes(list_lora_factors(model, "mlx"), model.config, base)


def check_gguf(source: ExportSource, config: ExportConfig) -> None:
    model: Any = source.pretrained.model
    if config.adapter:
        check_adapter(model, source.require_adapter("gguf --adapter").base, config.base)
    else:
        check_model(model, source.tokenizer, config.quantize)


def check_ollama(source: ExportSource, config: ExportConfig) -> None:
    check_gguf(source, config)
    if isinstance(source.tokenizer, HuggingFaceTokenizer):
        describe(source, source.tokenizer, adds_bos=False)


FURTHER: dict[Format, Callable[[ExportSource, ExportConfig], None]] = {
    "mlx": check_mlx,
    "gguf": check_gguf,
    "ollama": check_ollama,
}
"""What some forms ask for beside the kind of the model."""
