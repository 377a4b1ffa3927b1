"""What a form of export asks of a model: it is refused before the model is asked and anything is written."""

from collections.abc import Callable
from typing import Any

from dpo_wrapper.commands.export.config import ExportConfig, Format
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.hyperparameters import add_hyperparameters
from dpo_wrapper.commands.export.gguf.model_file import import_gguf
from dpo_wrapper.commands.export.gguf.storage import check_quantizer
from dpo_wrapper.commands.export.gguf.vocabulary import add_vocabulary
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
        source.require_adapter("gguf --adapter")
        list_lora_factors(model, "gguf --adapter")
        return
    check_quantizer(config.quantize)
    whole = model if source.pretrained.adapter is None else model.get_base_model()
    family = find_family(whole)
    writer = import_gguf().GGUFWriter(None, family.architecture)  # of no file
    add_hyperparameters(writer, whole, family)
    add_vocabulary(writer, source.tokenizer, source.pretrained.num_embeddings)


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
