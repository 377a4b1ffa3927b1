"""A model with its reference: what the reference of a run is, and what is refused."""

import json

import pytest
import torch

from dpo_wrapper.data import load_tokenizer
from dpo_wrapper.evaluation.model_pair import load_model_pair
from dpo_wrapper.pretrained import PRESETS, PretrainedModel, load_pretrained, save_pretrained
from dpo_wrapper.training.train import train
from helpers.lora_runs import logits_of, make_lora_config, save_llama
from helpers.models import hf_llama
from helpers.runs import QUICK, SMALL_DECODER, make_config
from helpers.tokenizers import save_tokenizer


def reference_logits(pair):
    with pair.reference_model() as model:
        return logits_of(model)


def load_logits(folder):
    return logits_of(load_pretrained(str(folder), None, 128).model)


def test_the_reference_of_a_new_adapter_is_the_model_without_it(lora_run, llama):
    pair = load_model_pair(str(lora_run))
    assert pair.description == f"reference: the base model ({llama}) with the adapter switched off."
    assert pair.loss == "sigmoid(beta=0.1) + 1.0*sft" and pair.dpo.ref_model is None
    torch.testing.assert_close(reference_logits(pair), load_logits(llama))
    torch.testing.assert_close(logits_of(pair.policy.model), load_logits(lora_run))
    assert not torch.allclose(reference_logits(pair), logits_of(pair.policy.model), atol=1e-3)
    assert not any(p.requires_grad for p in pair.dpo.parameters())


def test_a_reference_that_is_the_adapters_base_costs_no_second_model(lora_run, llama):
    assert load_model_pair(str(lora_run), str(llama)).dpo.ref_model is None


def test_the_reference_of_a_run_with_stages_is_the_model_after_the_stage_before(staged_run):
    pair = load_model_pair(str(staged_run))
    sft = staged_run / "sft"
    assert pair.description == f"reference: the model as it was after sft ({sft})." and pair.loss == "simpo"
    assert torch.equal(reference_logits(pair), load_logits(sft))
    assert torch.equal(logits_of(pair.policy.model), load_logits(staged_run))
    assert load_model_pair(str(staged_run), loss="ipo").loss == "ipo"


@pytest.mark.slow
def test_an_adapter_that_goes_on_is_compared_with_what_it_was(rows, tmp_path, lora_run, llama):
    train(make_lora_config(rows, tmp_path / "second", lora_run, lora=False, **QUICK))
    pair = load_model_pair(str(tmp_path / "second"))
    assert pair.description == f"reference: {llama} with the adapter as it was loaded from {lora_run}."
    torch.testing.assert_close(reference_logits(pair), load_logits(lora_run))
    torch.testing.assert_close(logits_of(pair.policy.model), load_logits(tmp_path / "second"))
    assert not torch.allclose(reference_logits(pair), logits_of(pair.policy.model), atol=1e-3)
    ours, theirs = (dict(one.model.named_parameters()) for one in pair.models)
    assert all((ours[name].data_ptr() == theirs[name].data_ptr()) == ("lora_" not in name) for name in ours)


@pytest.mark.slow
def test_the_stage_before_of_an_adapter_shares_its_base(rows, tmp_path, llama):
    train(
        make_lora_config(rows, tmp_path / "out", llama, **(QUICK | {"sft_epochs": 1, "lora_init": "pissa"}))
    )
    pair = load_model_pair(str(tmp_path / "out"))
    assert pair.description.startswith("reference: the model as it was after sft")
    torch.testing.assert_close(reference_logits(pair), load_logits(tmp_path / "out" / "sft"))
    torch.testing.assert_close(logits_of(pair.policy.model), load_logits(tmp_path / "out"))
    ours, theirs = (dict(one.model.named_parameters()) for one in pair.models)
    assert all((ours[name].data_ptr() == theirs[name].data_ptr()) == ("lora_" not in name) for name in ours)


@pytest.mark.slow
def test_a_run_that_trains_all_weights_is_compared_with_its_model(rows, tmp_path, llama):
    train(make_config(rows, tmp_path / "out", model=str(llama), sft_epochs=0, **QUICK))
    pair = load_model_pair(str(tmp_path / "out"))
    assert pair.description == f"reference: {llama}, from which the run began."
    assert torch.equal(reference_logits(pair), load_logits(llama))


@pytest.mark.slow
def test_a_new_model_without_a_stage_before_has_no_reference(rows, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    train(make_config(rows, tmp_path / "out", **(QUICK | {"sft_epochs": 0})))
    pair = load_model_pair(str(tmp_path / "out"))
    assert "began as a new model, which is not kept" in pair.description
    assert not pair.has_reference


def test_a_model_that_is_no_run_has_the_reference_that_is_named(llama, tmp_path):
    other = save_llama(tmp_path / "other", tie_word_embeddings=True)
    alone = load_model_pair(str(llama))
    assert alone.description.startswith("reference: none, for") and alone.loss == "sigmoid(beta=0.1)"
    with alone.reference_model() as model:
        assert model is None
    pair = load_model_pair(str(llama), str(other))
    assert pair.description == f"reference: {other}."
    assert torch.equal(reference_logits(pair), load_logits(other))
    assert not load_model_pair(str(llama), "none").has_reference


def test_what_is_no_trained_model_is_refused(llama, lora_run, tmp_path):
    with pytest.raises(ValueError, match="the model should be trained, but tiny stands for a new one"):
        load_model_pair("tiny")
    with pytest.raises(ValueError, match="the reference should be trained, but small"):
        load_model_pair(str(llama), "small")
    with pytest.raises(ValueError, match=r"^the reference should be a run folder or a .* but it is"):
        load_model_pair(str(llama), str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="did you mean"):
        load_model_pair(str(llama), loss="sigmoidd")


def test_what_a_run_began_from_has_to_be_there(lora_run, tmp_path):
    run = json.loads((lora_run / "run.json").read_text())
    run["settings"]["adapter"] = str(tmp_path / "gone")
    (tmp_path / "run").mkdir()
    for file in lora_run.iterdir():
        if file.is_file():
            (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"began from should be in .*gone .* name it by --reference"):
        load_model_pair(str(tmp_path / "run"))


def test_a_reference_reads_the_same_tokens(llama, tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer"))
    model = hf_llama(0, vocab_size=tokenizer.vocab_size)
    save_pretrained(PretrainedModel(model, tokenizer, "other", None), model, tmp_path / "other")
    with pytest.raises(ValueError, match="the reference should read the same tokens as"):
        load_model_pair(str(llama), str(tmp_path / "other"))
