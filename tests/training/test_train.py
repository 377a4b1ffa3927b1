"""The training command: what it writes to the run folder, and what it prints."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import train
from helpers.datasets import write_rows
from helpers.runs import ROOT, interrupt_training, make_config, read_metrics
from helpers.shareable_models import hf


def test_the_run_folder_holds_what_it_says(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {"config.json", "metrics.jsonl", "model.safetensors", "curves.png", "sft"} <= names
    assert not any(name.startswith("checkpoint") or name.endswith(".new") for name in names)
    run = json.loads((finished_run / "run.json").read_text())
    assert run["status"] == "finished" and run["settings"]["loss"] == TrainConfig(data=Path("x")).loss
    assert "dpo_wrapper" not in (finished_run / "config.json").read_text()
    assert (finished_run / "curves.png").stat().st_size > 20_000

    log = read_metrics(finished_run)
    parts = [(record["stage"], record["part"]) for record in log]
    steps = [record["step"] for record in log if record["stage"] == "dpo" and record["part"] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 10
    assert parts.count(("dpo", "train")) == 2 and parts.count(("dpo", "eval")) >= 3
    before = log[parts.index(("dpo", "eval"))]
    assert before["rewards/accuracies"] == 0.5 and before["rewards/margins"] == 0.0


def test_the_policy_is_loaded_by_this_package_and_by_plain_x_transformers(finished_run):
    from x_transformers import Decoder, TransformerWrapper

    weights = load_file(finished_run / "model.safetensors")
    assert not any("ref_model" in name for name in weights)
    arguments = json.loads((finished_run / "config.json").read_text())["x_transformers"]
    layers = Decoder(**arguments.pop("attn_layers"))
    plain = TransformerWrapper(**arguments, attn_layers=layers)
    plain.load_state_dict(weights)
    ours = load_pretrained(str(finished_run), None, 128)
    ids = torch.arange(20)[None]
    assert torch.equal(plain.eval()(ids), ours.model.eval()(ids))
    sft = load_pretrained(str(finished_run / "sft"), None, 128)
    assert not torch.equal(sft.model.eval()(ids), ours.model.eval()(ids))


@pytest.mark.slow
def test_a_run_starts_from_the_model_in_a_run_folder(finished_run, rows, tmp_path):
    train(make_config(rows, tmp_path / "again", model=str(finished_run), epochs=1, sft_epochs=None))
    log = read_metrics(tmp_path / "again")
    assert {record["stage"] for record in log} == {"dpo"}, "no supervised training of a model that is not new"
    ours, theirs = (load_file(path / "model.safetensors") for path in (finished_run, tmp_path / "again"))
    assert ours.keys() == theirs.keys()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_model_by_folder_with_its_tokenizer(rows, tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import hugging_face  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    base = tmp_path / "base"
    hugging_face.build_model(base)
    if tied:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = LlamaConfig.from_pretrained(base)
        settings.tie_word_embeddings = True
        LlamaForCausalLM(settings).save_pretrained(base)
    out = tmp_path / "out"
    options = {"learning_rate": 1e-2, "loss": "sigmoid + 0.5*sft", "sft_epochs": None}
    train(make_config(rows, out, model=str(base), **options))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, out))
    assert {record["stage"] for record in read_metrics(out)} == {"dpo"}
    assert read_metrics(out)[-1]["rewards/accuracies"] > 0.8
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert load_pretrained(str(out), None, 128).tokenizer.vocab_size == before.config.vocab_size


@pytest.mark.slow
def test_the_experts_of_a_mixture_are_balanced(rows, tmp_path):
    base = tmp_path / "base"
    hf("Mixtral", num_local_experts=3, vocab_size=300, max_position_embeddings=128)(0).save_pretrained(base)
    options = {"model": str(base), "tokenizer": "bytes", "learning_rate": 1e-2, "micro_batch_tokens": 300}
    options["train_on_prompt"] = True
    records = {}
    for coef in (None, 1.0):
        out = tmp_path / str(coef)
        train(make_config(rows, out, router_aux_loss_coef=coef, **options))
        records[coef] = read_metrics(out)
    first, balanced_first = (
        next(record for record in log if record["part"] == "step") for log in records.values()
    )
    assert first["stage"] == "sft"
    assert balanced_first["loss"] > first["loss"] + 1.9  # of 3 experts 2 are chosen, so that it is about 2
    assert not any("aux_loss" in record for record in records[None])
    for record in records[1.0]:
        assert ("aux_loss" in record) == ((record["stage"], record["part"]) == ("dpo", "step"))
        assert record.get("aux_loss", 2.0) == pytest.approx(2.0, abs=0.2)


@pytest.mark.slow
def test_without_eval_rows_the_train_metrics_are_printed(rows, tmp_path, capsys):
    first = [json.loads(line) for line in rows.read_text().splitlines()[:8]]
    without_split = [{k: v for k, v in row.items() if k != "split"} for row in first]
    path = write_rows(tmp_path / "all.jsonl", without_split)
    train(make_config(path, tmp_path / "out", eval_fraction=0.0, epochs=1))
    printed = capsys.readouterr().out
    assert "8 train and 0 eval pairs" in printed and "train before" in printed
    assert "reference" in printed and "policy" in printed


@pytest.fixture
def rwkv(tmp_path):
    """RWKV-4, which divides some of its weights in eval mode, by 2 and 4 with these options."""
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 6}
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=300, context_length=32, rescale_every=2, **sizes))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train_rescaled(rows, out, base, **options):
    """Train at a rate at which no weight moves."""
    limits = {"model": str(base), "tokenizer": "bytes", "max_length": 12, "batch_size": 4, "save_steps": 1}
    return train(make_config(rows, out, learning_rate=1e-30, epochs=1, **limits, **options))


def assert_same_weights(one, other):
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (one, other)]
    for (name, weight), (_, same) in zip(*(model.named_parameters() for model in models), strict=True):
        torch.testing.assert_close(weight, same, rtol=0, atol=1e-20, msg=name)  # zeros move by the rate


@pytest.mark.slow
def test_weights_that_a_model_rescales_in_eval_mode_are_saved_as_they_train(rows, tmp_path, rwkv):
    out = tmp_path / "out"
    with interrupt_training("dpo", after_steps=2):
        train_rescaled(rows, out, rwkv, sft_epochs=0)
    train_rescaled(rows, out, rwkv, sft_epochs=0, resume=True)
    assert_same_weights(rwkv, out)
    losses = [record["loss"] for record in read_metrics(out)]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("keep_best", [False, True])
def test_weights_that_a_model_rescales_are_right_where_stages_stop_early(rows, tmp_path, rwkv, keep_best):
    """No evaluation is better than the first one; `sft/` and the run then hold what they began with."""
    out = tmp_path / "out"
    options = {"eval_steps": 1, "exact_answers": 1, "keep_best": keep_best}
    train_rescaled(rows, out, rwkv, sft_learning_rate=1e-30, early_stopping_patience=2, **options)
    records = read_metrics(out)
    assert max(record["step"] for record in records) < 5
    for folder in (out / "sft", out):
        assert_same_weights(rwkv, folder)
    margins = [record["rewards/margins"] for record in records if record["stage"] == "dpo"]
    assert margins == pytest.approx([0] * len(margins), abs=1e-5)


def test_prompts_that_are_trained_on_and_evaluated_on_are_counted(rows, tmp_path):
    lines = rows.read_text().splitlines()
    eval_data = tmp_path / "eval.jsonl"
    eval_data.write_text("\n".join([*lines[:4], json.dumps({"prompt": "?", "chosen": "a", "rejected": "b"})]))
    setup = set_up_training(make_config(rows, tmp_path / "out", eval_data=eval_data))
    assert any(
        note.startswith("3 of the 5 eval examples have prompts that are trained on") for note in setup.notes
    )
    setup = set_up_training(make_config(rows, tmp_path / "out"))
    assert not any("trained on" in note for note in setup.notes)
