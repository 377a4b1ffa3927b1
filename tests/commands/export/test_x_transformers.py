"""`--to x-transformers`: three lines of Python load the model without this package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from dpo_wrapper.commands.export import x_transformers
from dpo_wrapper.pretrained import PRESETS, load_pretrained, save_pretrained
from dpo_wrapper.pretrained.decoder import build_preset
from dpo_wrapper.training.train import train
from helpers.exports import export_to, flip_lowest_bit
from helpers.lora_runs import logits_of, make_lora_config
from helpers.models import seeded
from helpers.runs import QUICK, SMALL_DECODER
from helpers.tokenizers import CHATML, save_tokenizer


def read_lines(printed):
    """The lines of Python that the command has printed."""
    return [line[4:] for line in printed.splitlines() if line.startswith("    ")]


@pytest.mark.slow
def test_the_three_lines_load_the_model_in_a_process_of_its_own(decoder, tmp_path, capsys):
    out = tmp_path / "it's here"  # a path with a quotation mark in it
    assert export_to(out, decoder, "x-transformers") == 0
    lines = read_lines(capsys.readouterr().out)
    assert len(lines) == 3
    code = [
        *lines,
        "import json, sys, torch",
        "assert 'dpo_wrapper' not in sys.modules",
        "with torch.no_grad(): logits = model.eval()(torch.arange(20)[None])",
        "print(json.dumps(logits.tolist()))",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, cwd=out, env=environment
    )
    expected = logits_of(load_pretrained(str(decoder), None, 64).model)
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-5), done.stderr


def test_a_decoder_with_a_hugging_face_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    tokenizer = save_tokenizer(tmp_path / "tokenizer", eos="<|im_end|>", template=CHATML)
    with seeded(0):
        pretrained = build_preset("tiny", str(tokenizer), 64, {})
    save_pretrained(pretrained, pretrained.model, tmp_path / "decoder")
    assert export_to(tmp_path / "out", tmp_path / "decoder", "x-transformers") == 0
    names = {}
    exec("\n".join(read_lines(capsys.readouterr().out)), names)
    assert torch.equal(logits_of(names["model"]), logits_of(pretrained.model))
    loaded = load_pretrained(str(tmp_path / "out" / "x-transformers"), None, 64)
    assert loaded.tokenizer.has_chat_template
    assert loaded.tokenizer.encode("Hello there") == pretrained.tokenizer.encode("Hello there")


@pytest.mark.slow
def test_an_adapter_of_a_decoder_is_merged(rows, decoder, tmp_path, capsys):
    train(make_lora_config(rows, tmp_path / "run", decoder, **QUICK))
    capsys.readouterr()
    assert export_to(tmp_path / "out", tmp_path / "run", "x-transformers") == 0
    names = {}
    exec("\n".join(read_lines(capsys.readouterr().out)), names)
    run, base = (load_pretrained(str(folder), None, 64).model for folder in (tmp_path / "run", decoder))
    assert torch.allclose(logits_of(names["model"]), logits_of(run), atol=1e-5)
    assert not torch.allclose(logits_of(run), logits_of(base), atol=1e-3)


def test_a_tampered_bit_is_found_out(decoder, tmp_path, monkeypatch, capsys):
    def save_and_tamper(pretrained, model, folder):
        save_pretrained(pretrained, model, folder)
        flip_lowest_bit(folder)

    monkeypatch.setattr(x_transformers, "save_pretrained", save_and_tamper)
    assert export_to(tmp_path, decoder, "x-transformers") == 1
    assert "tensors are others (attn_layers.layers.0.1.to_q.weight)" in capsys.readouterr().out


def test_models_of_other_libraries_are_refused(llama, decoder, tmp_path):
    with pytest.raises(ValueError, match=f"but {llama} is one of Hugging Face: use --to merged"):
        export_to(tmp_path, llama, "x-transformers")
    for form in ("merged", "peft"):
        with pytest.raises(ValueError, match=f"but {decoder} is one of x-transformers: use --to x-transf"):
            export_to(tmp_path, decoder, form)
    assert not list(tmp_path.iterdir())
