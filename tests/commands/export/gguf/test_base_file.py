"""`--base`: which GGUF files an adapter can be tried on, and what it should say there."""

import numpy as np
import pytest
import torch

from dpo_wrapper.commands.export.agreement import TOLERANCES
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.gguf.adapter import ROUNDED_ACTIVATIONS, write_gguf_adapter
from dpo_wrapper.commands.export.gguf.base_file import check_base_file
from dpo_wrapper.commands.export.gguf.families import find_family
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.pretrained import load_pretrained
from helpers.exported_models import save_base, save_lora
from helpers.exports import read_record
from helpers.gguf_files import change, edited_copy, export_adapter, write_base
from helpers.tokenizers import CHATML

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(lora):
    return load_pretrained(str(lora), None, 1).model.get_base_model()


@pytest.mark.parametrize("template", [CHATML.replace("<|im_start|>{{", "{{"), "{{ messages + 1 }}", ""])
def test_command_gives_the_template_of_the_training(template, base_file, lora, tmp_path, capsys):
    """The base's file has one that writes another text, or fails, or none."""
    file = edited_copy(base_file, tmp_path, change("tokenizer.chat_template", template))
    assert export_adapter(lora, tmp_path, base=file) == 0
    output = capsys.readouterr().out
    assert f"--jinja --chat-template-file {tmp_path}/gguf/chat_template.jinja" in output
    assert (tmp_path / "gguf" / "chat_template.jinja").read_text() == CHATML
    assert "the base's file writes dialogues otherwise" in output


def test_quantized_base_is_what_counts(lora, base, tmp_path):
    """What it should say is what PEFT says on the weights of the file, and not on its own base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base_file = write_base(base, tmp_path / "base.gguf", "q8_0")
    config = ExportConfig(
        model=str(lora),
        to=("gguf",),
        out=tmp_path,
        adapter=True,
        base=base_file,
        prompts=("Hello",),
        num_tokens=3,
    )
    source = ExportSource.load(config).answer(config)
    (tmp_path / "gguf").mkdir()
    checks = write_gguf_adapter(source, tmp_path / "gguf", config).checks
    options = {"gguf_file": base_file.name, "dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(base_file.parent, **options)
    model = PeftModel.from_pretrained(base, str(lora)).eval()
    for output, on_own_base in zip(checks[0].outputs, source.outputs, strict=True):
        logits = model(torch.tensor([output.ids])).logits[0, -len(output.answer_ids) :]
        np.testing.assert_allclose(output.logits, logits.detach(), atol=1e-4)
        assert np.abs(output.logits[0] - on_own_base.logits[0]).max() > 1e-2
    assert {check.tolerance for check in checks[:2]} == {TOLERANCES["float32"]}
    if checks[1].open_reader is not None:  # llama-cpp-python is installed
        assert checks[2].tolerance == ROUNDED_ACTIVATIONS


def test_head_of_its_own_in_the_file(tmp_path):
    """Embeddings and head that are one weight in the model can be changed where the file has two."""
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    lora = save_lora(tmp_path / "lora", base, target_modules=["embed_tokens", "lm_head", "q_proj"])
    file = write_base(base, tmp_path / "base.gguf")

    def add_head(fields, tensors):
        tensors["output.weight"] = 1.25 * tensors["token_embd.weight"]

    assert export_adapter(lora, tmp_path, base=edited_copy(file, tmp_path / "base", add_head)) == 0
    assert read_record(tmp_path / "gguf")["agreements"][0]["difference"] < 1e-5


def widen(fields, tensors):
    tensors["blk.1.ffn_up.weight"] = np.zeros((52, 32), np.float32)


@pytest.mark.parametrize(
    "edit, reason",
    [
        (change("general.architecture", "qwen2"), "the architecture in .* is qwen2 and not llama"),
        (change("llama.block_count", 3), "the number of layers in .* is 3 and not 2"),
        (change("llama.attention.head_count", 2), "the number of heads in .* is 2 and not 4"),
        (change("split.count", 2), "the number of files .* is 2 and not 1"),
        (change("general.type", "adapter"), "the type in .* is adapter and not model"),
        (widen, r"the shape of blk.1.ffn_up.weight in .* is \(52, 32\) and not \(48, 32\)"),
        (
            lambda fields, tensors: tensors.pop("blk.0.attn_v.weight"),
            "the shape of blk.0.attn_v.weight in .* is None",
        ),
    ],
)
def test_refuses_another_base(edit, reason, model, base_file, tmp_path):
    file = edited_copy(base_file, tmp_path, edit)
    with pytest.raises(ValueError, match=f"--base should be the GGUF file of NAME, but {reason}"):
        check_base_file(file, model, find_family(model), "NAME")


def test_accepts_the_base(model, base_file):
    check_base_file(base_file, model, find_family(model), "NAME")


def test_refuses_what_is_no_file(lora, tmp_path):
    file = tmp_path / "base.gguf"
    with pytest.raises(ValueError, match="is not there"):
        export_adapter(lora, tmp_path, base=file)
    file.write_text("GGUF is what this is not")
    with pytest.raises(ValueError, match="should be a GGUF file, but it cannot be read"):
        export_adapter(lora, tmp_path, base=file)
