"""Read small GGUF files, and write them again with something changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors by name; the tensors as they are stored."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if name[:4] != "GGUF"}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def edit_gguf(file: Path, edit: Edit) -> None:
    """Write a file of float32 or float16 anew, after `edit(fields, tensors)` has changed them in place."""
    from gguf import GGUFReader, GGUFWriter

    types = {name: field.types for name, field in GGUFReader(file).fields.items()}
    fields, tensors = read_gguf(file)
    edit(fields, tensors)
    writer = GGUFWriter(file, fields.pop("general.architecture"))
    for name, value in fields.items():
        kinds = types.get(name, [])
        if kinds:
            writer.add_key_value(name, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
        else:
            writer.add_uint32(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
