"""`--to merged`: a Hugging Face folder without adapter, and a tampered one is found out."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.commands.export import merged as module
from dpo_wrapper.commands.export.merged import repeat_rope_keys
from dpo_wrapper.pretrained import load_pretrained
from helpers.exports import export_to, flip_lowest_bit, read_record, save_trained_adapter
from helpers.lora_runs import logits_of, save_llama
from helpers.tokenizers import CHATML, save_tokenizer


def load(folder):
    return load_pretrained(str(folder), None, 64).model


def test_the_merged_weights_are_those_of_float32_rounded_once(llama, adapter, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert export_to(tmp_path, adapter, "merged") == 0
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter).merge_and_unload()
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in whole.state_dict().items()}
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    base = load_file(llama / "model.safetensors")
    assert not torch.equal(
        written["model.layers.0.self_attn.q_proj.weight"].float(),
        base["model.layers.0.self_attn.q_proj.weight"].to(torch.bfloat16).float(),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_of_the_weights_is_named_by_both_keys(dtype, adapter, tmp_path):
    assert export_to(tmp_path, adapter, "merged", dtype=dtype) == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    tensors = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {getattr(torch, dtype)}


def test_a_tampered_bit_is_found_out(adapter, tmp_path, monkeypatch, capsys):
    write = module.write_dtype

    def write_and_tamper(file, dtype):
        write(file, dtype)
        flip_lowest_bit(file.parent)

    monkeypatch.setattr(module, "write_dtype", write_and_tamper)
    assert export_to(tmp_path, adapter, "merged", dtype="float32") == 1
    assert (
        "but 1 of 21 tensors are others (model.layers.0.self_attn.q_proj.weight)" in capsys.readouterr().out
    )


def test_positions_of_another_base_are_found_out(adapter, tmp_path, monkeypatch, capsys):
    """The weights are right, but a program that reads other keys takes other positions."""

    def break_rope(file):
        settings = json.loads(file.read_text())
        settings["rope_parameters"]["rope_theta"] = 10_000.0
        file.write_text(json.dumps(settings))

    monkeypatch.setattr(module, "repeat_rope_keys", break_rope)
    assert export_to(tmp_path, adapter, "merged", dtype="float32", num_tokens=16) == 1
    assert "transformers: logits differ by" in capsys.readouterr().out
    record = read_record(tmp_path / "merged.differs")
    assert record["status"] == "differs" and "should compute what the model does" in record["error"]


TARGETS = {
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole-head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "blocks": {},
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_are_parted_where_one_of_them_is_adapted(targets, is_tied, tmp_path):
    base = save_llama(tmp_path / "base", tie_word_embeddings=is_tied)
    adapter = save_trained_adapter(base, tmp_path / "adapter", **TARGETS[targets])
    expected = logits_of(load(adapter))
    assert export_to(tmp_path / "out", adapter, "peft", "merged", dtype="float32") == 0
    written = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in written)
    assert targets != "blocks" or config["tie_word_embeddings"] == is_tied
    for name in ("merged", "peft"):
        assert torch.allclose(logits_of(load(tmp_path / "out" / name)), expected, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"rank_pattern": {"v_proj": 2}}],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_adapter_is_merged(options, llama, tmp_path):
    adapter = save_trained_adapter(llama, tmp_path / "adapter", **options)
    assert export_to(tmp_path / "out", adapter, "peft", "merged", dtype="float32") == 0
    expected, merged = logits_of(load(adapter)), logits_of(load(tmp_path / "out" / "merged"))
    assert torch.allclose(merged, expected, atol=1e-4)
    assert not torch.allclose(expected, logits_of(load(llama)), atol=0.1)


def test_what_peft_cannot_merge_is_refused(llama, tmp_path):
    adapter = save_trained_adapter(llama, tmp_path / "adapter", lora_bias=True)
    with pytest.raises(ValueError, match=r"should be one that PEFT can merge, but .*: use --to peft\.$"):
        export_to(tmp_path / "out", adapter, "merged")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_too_large_for_float16_are_refused(tmp_path):
    base = save_llama(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 70_000.0
    from safetensors.torch import save_file

    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"but model.norm.weight has one of 7.0e\+04, .* float16: use bfl"):
        export_to(tmp_path / "out", base, "merged", dtype="float16")
    assert export_to(tmp_path / "out", base, "merged") == 0


def test_the_files_beside_the_weights_are_kept(llama, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.manual_seed(0)  # the new rows are random
    model.resize_token_embeddings(420, mean_resizing=False)
    model.generation_config.update(temperature=0.7, do_sample=True, eos_token_id=[4, 1])
    model.save_pretrained(base)
    save_tokenizer(base, eos="<|im_end|>", template=CHATML)
    adapter = save_trained_adapter(base, tmp_path / "adapter")
    assert export_to(tmp_path / "out", adapter, "merged", "peft", dtype="float32") == 0
    generation = json.loads((tmp_path / "out" / "merged" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["eos_token_id"]) == (0.7, [4, 1])
    turns = [{"role": "user", "content": "Hi"}]
    options = {"add_generation_prompt": True, "tokenize": True}
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(turns, **options)
    for name in ("merged", "peft"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / name)
        assert tokenizer.apply_chat_template(turns, **options) == expected


def test_other_programs_find_positions_at_the_top(tmp_path):
    file = tmp_path / "config.json"
    rope = {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}
    file.write_text(json.dumps({"rope_parameters": rope}))
    repeat_rope_keys(file)
    config = json.loads(file.read_text())
    assert config["rope_theta"] == 500.0 and config["rope_parameters"] == rope
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    file.write_text(json.dumps({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}))
    repeat_rope_keys(file)
    assert "rope_scaling" not in json.loads(file.read_text())
