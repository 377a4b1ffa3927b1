"""What a form of export asks of a model: it is refused before the model is asked and anything is written."""

from typing import Any

from dpo_wrapper.commands.export.config import ExportConfig, Format
from dpo_wrapper.commands.export.gguf.adapter_file import check_adapter
from dpo_wrapper.commands.export.gguf.keys import check_model
from dpo_wrapper.commands.export.lora_factors import list_lora_factors
from dpo_wrapper.commands.export.mlx import check_mlx_takes
from dpo_wrapper.commands.export.mlx_base import find_folder
from dpo_wrapper.commands.export.ollama.writer import check_ollama
from dpo_wrapper.commands.export.source import ExportSource


def check_requirements(source: ExportSource, form: Format, config: ExportConfig) -> None:
    """Raise if a model cannot be exported in a form, as far as that is known before its weights are merged.

    Raises:
        ValueError: its kind, architecture, tokenizer or adapter has no such form.
        ImportError: a library or program that is needed is missing.
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
    if form == "mlx":
        check_mlx(source)
    if form in ("gguf", "ollama"):
        check_gguf(source, form, config)
    if form == "ollama":
        check_ollama(source, config)


def check_mlx(source: ExportSource) -> None:
    """Raise ValueError for an adapter or a base that mlx-lm cannot compute."""
    base, model = source.require_adapter("mlx").base, source.pretrained.model
    settings: Any = model.config
    check_mlx_takes(list_lora_factors(model, "mlx"), settings, find_folder(base))


def check_gguf(source: ExportSource, form: Format, config: ExportConfig) -> None:
    """Raise ValueError or ImportError for a model or an adapter that has no GGUF file."""
    model = source.pretrained.model
    if config.adapter:
        check_adapter(model, source.require_adapter(f"{form} --adapter").base, config.base)
    else:
        check_model(model, source.tokenizer, config.quantize)
