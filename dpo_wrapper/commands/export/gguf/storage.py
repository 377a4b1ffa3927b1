"""How the tensors of a GGUF file are stored: in 32 or 16 bits, or quantized."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dpo_wrapper.commands.export.agreement import ExportError
from dpo_wrapper.commands.export.config import Quantization, WeightDtype
from dpo_wrapper.commands.export.gguf.tensors import Array

FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}
TENSOR_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
PROGRAM = "llama-quantize"
QUANTIZER = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), options))
"""


def add_tensor(writer: Any, name: str, array: Array, stored: str) -> None:
    """Add a tensor in the type of a whole file, as llama.cpp mixes types.

    Vectors and norms stay in float32; rows that cannot be cut into blocks of 32 are in float16.

    Args:
        stored: a key of `TENSOR_TYPES`.

    Raises:
        ValueError: a weight is too large for it.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    tensor_type = GGMLQuantizationType[TENSOR_TYPES[stored] if array.ndim > 1 else "F32"]
    if array.shape[-1] % GGML_QUANT_SIZES[tensor_type][0]:
        tensor_type = GGMLQuantizationType.F16
    largest = float(np.abs(array).max())
    if tensor_type == GGMLQuantizationType.F16 and largest > np.finfo(np.float16).max:
        raise ValueError(
            f"--dtype should hold the model's weights, but {name} has one of {largest:.1e}, which is too "
            "large for float16: use bfloat16."
        )
    writer.add_tensor(name, quantize(array, tensor_type), raw_dtype=tensor_type)


def write_file(writer: Any) -> None:
    """Write what was added to a `gguf.GGUFWriter`, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_quantizer(quantization: Quantization) -> None:
    """Raise ImportError where the program that quantizes is missing."""
    if quantization == "q4_k_m" and find_spec("llama_cpp") is None and shutil.which(PROGRAM) is None:
        raise ImportError(
            f"--quantize q4_k_m needs llama.cpp's own quantizer, but neither llama-cpp-python nor {PROGRAM} "
            "is there: pip install llama-cpp-python, or take --quantize q8_0."
        )


def quantize_by_llama_cpp(file: Path, quantized: Path) -> None:
    """Write a file in float32 once more, as q4_k_m, in a process whose output is not shown.

    Raises:
        ExportError: llama.cpp does not quantize it.
    """
    files = [str(file), str(quantized)]
    if find_spec("llama_cpp") is None:
        command = [PROGRAM, *files, "Q4_K_M"]
    else:
        command = [sys.executable, "-c", QUANTIZER, *files]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        reason = ([line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"])[-1]
        raise ExportError(f"llama.cpp should quantize {file}, but it does not ({reason}).")


def stored_type(dtype: WeightDtype, quantization: Quantization) -> str:
    """The key of `TENSOR_TYPES` that is written, before llama.cpp's quantizer if that follows."""
    return {"none": dtype, "q8_0": "q8_0", "q4_k_m": "float32"}[quantization]
