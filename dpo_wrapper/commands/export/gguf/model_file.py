"""A whole model as one GGUF file for llama.cpp."""

from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.commands.export.agreement import TOLERANCES
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check, Exported
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.gguf.file_reader import GGUFFileReader
from dpo_wrapper.commands.export.gguf.keys import add_keys
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import check_by_llama_cpp
from dpo_wrapper.commands.export.gguf.storage import (
    add_tensor,
    quantize_by_llama_cpp,
    stored_type,
    write_file,
)
from dpo_wrapper.commands.export.gguf.tensors import convert_tensors, has_tied_head
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.weights import WeightDigests
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.pretrained.gguf_adapter import import_gguf
from dpo_wrapper.pretrained.model import CONFIG_FILE

MODEL_FILE = "model.gguf"


def write_gguf(source: ExportSource, folder: Path, config: ExportConfig) -> Exported:
    """Write the model, its adapter merged in float32, as a GGUF file, with what loads it back here.

    Raises:
        ValueError: the dtype cannot hold its weights.
    """
    model: Any = source.merge().pretrained.model
    file = folder / MODEL_FILE
    stored = stored_type(config.dtype, config.quantize)
    written = file if config.quantize != "q4_k_m" else folder / "float32.gguf"
    notes = write_base_gguf(model, source.tokenizer, written, stored)
    if written != file:
        quantize_by_llama_cpp(written, file)
        written.unlink()
    save_loading_files(model, source.tokenizer, folder)
    weights = digest_weights(model, config.dtype) if config.quantize == "none" else None
    tolerance = TOLERANCES[stored if config.quantize == "none" else config.quantize]
    checks = [
        Check(lambda: GGUFFileReader(file, weights), tolerance),
        check_by_llama_cpp(file, source.outputs, tolerance + find_family(model).llama_cpp_rounding),
    ]
    usage = [f"llama-cli -m {file}", f'llama_cpp.Llama(model_path="{file}")']
    return Exported(folder, checks, usage, [*notes, *([weights.note] if weights else [])])


def digest_weights(model: Any, dtype: str) -> WeightDigests | None:
    """Hashes of the weights that a file should hold; None where 1 is added to norms, which rounds them."""
    if find_family(model).norm_offset:
        return None
    return WeightDigests.of(model, getattr(torch, dtype))


def write_base_gguf(model: Any, tokenizer: Tokenizer, file: Path, dtype: str) -> list[str]:
    """Write a model of transformers without adapter; returns sentences on what a user should know.

    Args:
        dtype: float32, float16, bfloat16 or q8_0.

    Raises:
        ValueError: llama.cpp does not know the model or its tokenizer, or the dtype cannot hold its weights.
    """
    family = find_family(model)
    writer = import_gguf().GGUFWriter(file, family.architecture)
    notes = add_keys(writer, model, tokenizer, dtype)
    for name, array in convert_tensors(model, family):
        add_tensor(writer, name, array, dtype)
    write_file(writer)
    return notes


def save_loading_files(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json and the tokenizer, with which `load_pretrained` loads the file again."""
    settings = model.config.to_dict()
    settings["tie_word_embeddings"] = has_tied_head(model)
    type(model.config)(**settings).to_json_file(folder / CONFIG_FILE)
    tokenizer.save(folder)
