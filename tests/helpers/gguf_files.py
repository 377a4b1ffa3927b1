"""Small GGUF files of bases and adapters: write them, read them, and change something in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dpo_wrapper.commands.export.gguf.model_file import write_base_gguf
from dpo_wrapper.commands.export.lora_factors import LoraFactors, list_lora_factors
from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.pretrained import load_pretrained
from helpers.exports import export_to

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


def change(key: str, value: Any) -> Edit:
    """An edit of one setting."""
    return lambda fields, tensors: fields.update({key: value})


def edited_copy(file: Path, folder: Path, edit: Edit) -> Path:
    """A copy of a file in another folder, with something changed."""
    copy = folder / file.name
    copy.write_bytes(file.read_bytes())
    edit_gguf(copy, edit)
    return copy


def write_base(base: Path, file: Path, dtype: str = "float32") -> Path:
    """The GGUF file of a model in a folder."""
    write_base_gguf(load_pretrained(str(base), None, 1).model, load_tokenizer(base), file, dtype)
    return file


def export_adapter(lora: Path, out: Path, **options: Any) -> int:
    """`--to gguf --adapter`; returns how many exports differ."""
    return export_to(out, lora, "gguf", adapter=True, **options)


def load_factors(lora: Path) -> dict[str, LoraFactors]:
    """The factors in a folder of PEFT's, by the paths of modules."""
    model = load_pretrained(str(lora), None, 1).model
    return {one.path: one for one in list_lora_factors(model, "gguf")}
