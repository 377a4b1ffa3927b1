"""Adapters in GGUF files that were tampered with are found out, without llama.cpp."""

import re

import numpy as np
import pytest

from dpo_wrapper.commands.export.agreement import ExportError
from dpo_wrapper.commands.export.gguf import adapter
from dpo_wrapper.commands.export.gguf.adapter_reader import load_checked
from dpo_wrapper.pretrained import load_pretrained
from helpers.exports import read_record
from helpers.gguf_files import change, edit_gguf, edited_copy, export_adapter, load_factors

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(base):
    return load_pretrained(str(base), None, 1).model


@pytest.fixture(scope="module")
def factors(lora):
    return list(load_factors(lora).values())


def drop_tensors(fields, tensors):
    for letter in "ab":
        tensors.pop(f"blk.1.ffn_down.weight.lora_{letter}")


def restore_query_rows(fields, tensors):
    b = tensors["blk.0.attn_q.weight.lora_b"]
    tensors["blk.0.attn_q.weight.lora_b"] = b.reshape(4, 4, 2, -1).swapaxes(1, 2).reshape(b.shape)


def round_to_float16(fields, tensors):
    tensors |= {name: tensor.astype(np.float16) for name, tensor in tensors.items()}


def nudge(fields, tensors):
    tensors["blk.0.attn_v.weight.lora_b"] *= 1.001


def round_and_widen(fields, tensors):
    tensors |= {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "edit, reason",
    [
        (change("adapter.lora.alpha", 0.0), "as the adapter does"),
        (lambda fields, tensors: fields.pop("adapter.lora.alpha"), "as the adapter does"),
        (lambda fields, tensors: tensors.clear(), "changes 0"),
        (drop_tensors, "changes 13 .*mlp.down_proj"),
        (lambda fields, tensors: tensors.pop("blk.0.attn_k.weight.lora_b"), "two factors .* blk.0.attn_k"),
        (restore_query_rows, "layers.0.self_attn.q_proj as the adapter does"),
        (round_to_float16, "should be F32, but some are F16"),
        (round_and_widen, "as the adapter does"),
        (nudge, "layers.0.self_attn.v_proj as the adapter does"),
        (change("adapter.type", "alora"), "should hold a LoRA adapter"),
        (change("general.type", "model"), "should hold a LoRA adapter"),
    ],
)
def test_finds_a_wrong_file(edit, reason, model, factors, exported, tmp_path):
    edited_copy(exported / "adapter.gguf", tmp_path, edit)
    with pytest.raises(ExportError, match=reason):
        load_checked(tmp_path, model, factors)


def test_wrong_export_is_put_aside(lora, tmp_path, monkeypatch):
    write = adapter.write_adapter_file

    def write_wrong(factors, file, *args, **options):
        write(factors, file, *args, **options)
        edit_gguf(file, change("adapter.lora.alpha", 0.0))

    monkeypatch.setattr(adapter, "write_adapter_file", write_wrong)
    assert export_adapter(lora, tmp_path) == 1
    assert not (tmp_path / "gguf").exists()
    record = read_record(tmp_path / "gguf.differs")
    assert record["status"] == "differs" and re.search("as the adapter does", record["error"])


@pytest.mark.parametrize("size", [0, 3, 30, 2000, -100])
def test_finds_a_part_of_a_file(size, model, factors, exported, tmp_path):
    (tmp_path / "adapter.gguf").write_bytes((exported / "adapter.gguf").read_bytes()[:size])
    with pytest.raises(ExportError, match="should be a GGUF file, but it cannot be read"):
        load_checked(tmp_path, model, factors)
