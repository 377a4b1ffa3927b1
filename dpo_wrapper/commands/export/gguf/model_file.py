"""A whole model as one GGUF file for llama.cpp."""

from pathlib import Path
from typing import Any

from dpo_wrapper.commands.export.agreement import TOLERANCES
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.file_reader import GGUFFileReader
from dpo_wrapper.commands.export.gguf.hyperparameters import add_hyperparameters
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import check_by_llama_cpp
from dpo_wrapper.commands.export.gguf.storage import (
    FILE_TYPES,
    add_tensor,
    check_quantizer,
    quantize_by_llama_cpp,
    stored_type,
)
from dpo_wrapper.commands.export.gguf.tensors import convert_tensors, has_tied_head
from dpo_wrapper.commands.export.gguf.vocabulary import add_vocabulary
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.pretrained.model import CONFIG_FILE

MODEL_FILE = "model.gguf"


def write_gguf(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write the model, its adapter merged in float32, as a GGUF file, with what loads it back here.

    Raises:
        ValueError: llama.cpp does not know the model or its tokenizer.
        ImportError: a library or program that is needed is missing.
    """
    import_gguf()
    check_quantizer(config.quantize)
    if source.kind == "x_transformers":
        raise ValueError(
            f"--to gguf writes models of transformers, but {source.name} is one of x-transformers: use --to "
            "x-transformers."
        )
    model: Any = source.merge().pretrained.model
    file = folder / MODEL_FILE
    stored = stored_type(config.dtype, config.quantize)
    written = file if config.quantize != "q4_k_m" else folder / "float32.gguf"
    notes = write_base_gguf(model, source.tokenizer, written, stored)
    if written != file:
        quantize_by_llama_cpp(written, file)
        written.unlink()
    save_loading_files(model, source.tokenizer, folder)
    tolerance = TOLERANCES[stored if config.quantize == "none" else config.quantize]
    checks = [
        Check(lambda: GGUFFileReader(file), tolerance),
        check_by_llama_cpp(file, source.outputs, tolerance),
    ]
    usage = [f"llama-cli -m {file}", f'llama_cpp.Llama(model_path="{file}")']
    return Exported(folder, checks, usage, notes)


def write_base_gguf(model: Any, tokenizer: Tokenizer, file: Path, dtype: str) -> list[str]:
    """Write a model of transformers without adapter; returns sentences on what a user should know.

    Args:
        dtype: float32, float16, bfloat16 or q8_0.

    Raises:
        ValueError: llama.cpp does not know the model or its tokenizer.
    """
    gguf = import_gguf()
    family = find_family(model)
    writer = gguf.GGUFWriter(file, family.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(make_name(model, family.architecture))
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_hyperparameters(writer, model, family)
    notes += add_vocabulary(writer, tokenizer, len(model.get_input_embeddings().weight))
    for name, array in convert_tensors(model, family):
        add_tensor(writer, name, array, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def make_name(model: Any, architecture: str) -> str:
    """A name by which llama.cpp knows Phi-3, whose special tokens take the spaces behind them."""
    name = Path(model.config.name_or_path or "model").name or "model"
    return f"phi-3 {name}" if architecture == "phi3" and "phi-3" not in name.lower() else name.lower()


def save_loading_files(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json and the tokenizer, with which `load_pretrained` loads the file again."""
    settings = model.config.to_dict()
    settings["tie_word_embeddings"] = has_tied_head(model)
    type(model.config)(**settings).to_json_file(folder / CONFIG_FILE)
    tokenizer.save(folder)


def import_gguf() -> Any:
    """The library; ImportError with what to install if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("--to gguf needs the gguf package, but it is missing: pip install gguf.") from error
    return gguf
