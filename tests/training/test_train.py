"""The training command: what it writes, that it resumes to the same result, and that a step may be split."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.pretrained import load_policy
from dpo_wrapper.training.config import PRESETS, TrainConfig
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Loop, learning_rate_factor, step_indices
from helpers.runs import ROOT, Interrupted, config, records, train_twice


@pytest.fixture(autouse=True)
def small_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", {"dim": 32, "depth": 1, "heads": 1})


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", {"dim": 32, "depth": 1, "heads": 1})
        folder = tmp_path_factory.mktemp("run") / "out"
        train(config(rows, folder, save_every=0))
    return folder


def test_the_run_folder_holds_what_it_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "metrics.jsonl", "model.safetensors", "curves.png", "sft"} <= names
    assert "checkpoint" not in names
    settings = json.loads((finished / "config.json").read_text())
    assert settings["dpo_wrapper"]["loss"] == TrainConfig(data=Path("x")).loss
    assert (finished / "curves.png").stat().st_size > 20_000

    log = records(finished)
    stages = [(r["stage"], r["part"]) for r in log]
    steps = [r["step"] for r in log if r["stage"] == "dpo" and r["part"] == "step"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 10
    assert stages.count(("dpo", "training")) == 2 and stages.count(("dpo", "held-out")) >= 3
    before = next(r for r in log if (r["stage"], r["part"]) == ("dpo", "held-out"))
    assert before["rewards/accuracies"] == 0.5 and before["rewards/margins"] == 0.0


def test_the_policy_is_loaded_by_this_command_and_by_plain_x_transformers(finished):
    from x_transformers import Decoder, TransformerWrapper

    weights = load_file(finished / "model.safetensors")
    assert not any("ref_model" in name for name in weights)
    arguments = json.loads((finished / "config.json").read_text())["x_transformers"]
    layers = Decoder(**arguments.pop("attn_layers"))
    plain = TransformerWrapper(**arguments, attn_layers=layers)
    plain.load_state_dict(weights)
    ours = load_policy(str(finished), None, 128)
    ids = torch.arange(20)[None]
    assert torch.equal(plain.eval()(ids), ours.model.eval()(ids))
    sft = load_policy(str(finished / "sft"), None, 128)
    assert not torch.equal(sft.model.eval()(ids), ours.model.eval()(ids))


def test_a_run_goes_on_from_a_run_folder(finished, rows, tmp_path):
    train(config(rows, tmp_path / "again", model=str(finished), epochs=1, sft_epochs=None))
    log = records(tmp_path / "again")
    assert {r["stage"] for r in log} == {"dpo"}, "no warm-up for a model that is not new"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "again"))
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("stage, after", [("sft", 3), ("dpo", 1), ("dpo", 7)])
def test_an_interrupted_run_resumes_to_the_same_result(finished, rows, tmp_path, monkeypatch, stage, after):
    out = tmp_path / "out"
    step = Loop.step

    def breaks(self, accelerator, current, *args):
        if current.name == stage and breaks.left == 0:
            raise Interrupted
        breaks.left -= current.name == stage
        return step(self, accelerator, current, *args)

    breaks.left = after
    monkeypatch.setattr(Loop, "step", breaks)
    with pytest.raises(Interrupted):
        train(config(rows, out, save_every=2))
    monkeypatch.setattr(Loop, "step", step)
    torch.manual_seed(999)  # whatever the state of the new process
    train(config(rows, out, save_every=2, resume=True))
    assert records(out) == records(finished)
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_the_running_mean_of_a_loss_resumes(rows, tmp_path, monkeypatch):
    """BetaDPO's, which a checkpoint carries, and which one process moves once a step."""
    step, seen = Loop.step, []

    def watched(self, accelerator, current, *args):
        values = step(self, accelerator, current, *args)
        seen.append((float(current.dpo.gap.mean), float(current.dpo.gap.spread)))
        if len(seen) == breaks:
            raise Interrupted
        return values

    monkeypatch.setattr(Loop, "step", watched)
    more = {"loss": "betadpo(k=0.1, drop=0.2) + 0.5*sft", "sft_epochs": 0, "save_every": 2}
    breaks = 0
    train(config(rows, tmp_path / "whole", **more))
    whole, breaks = seen.copy(), 3
    assert len(whole) > 3 and len({mean for mean, _ in whole}) == len(whole)
    seen.clear()
    with pytest.raises(Interrupted):
        train(config(rows, tmp_path / "out", **more))
    breaks = 0
    train(config(rows, tmp_path / "out", resume=True, **more))
    assert seen[3:] == whole[2:]  # step 3 was done once more, from the checkpoint after step 2


@pytest.mark.parametrize("size", [1, 250])
def test_pitfall_23_micro_batches_give_the_same_update(finished, rows, tmp_path, size):
    train(config(rows, tmp_path / "out", max_tokens=size))
    expected, got = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "out"))
    for name in expected:
        assert torch.allclose(expected[name], got[name], atol=2e-5), name
    for a, b in zip(records(finished), records(tmp_path / "out"), strict=True):
        for name in a.keys() - {"tokens/padded", "tokens/unique", "stage", "part"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), name


def test_batches_made_by_workers_are_the_same(finished, rows, tmp_path):
    train(config(rows, tmp_path / "out", workers=2))
    assert records(tmp_path / "out") == records(finished)


def test_pitfall_22_two_processes_report_what_one_does(finished, rows, tmp_path):
    """Uneven: 21 training pairs in steps of 4 leave a step of one pair, for two processes."""
    out = tmp_path / "out"
    train_twice(tmp_path / "script.py", rows, out)
    one, two = records(finished), records(out)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"tokens/padded", "tokens/unique", "stage", "part"}:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), (
                a["stage"],
                a["part"],
                a["step"],
                name,
            )


def test_every_epoch_takes_each_row_once_and_orders_differ():
    steps = list(step_indices(10, 4, 2, seed=0))
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    first, second = ([row for step in half for row in step] for half in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert steps == list(step_indices(10, 4, 2, seed=0)) != list(step_indices(10, 4, 2, seed=1))


def test_the_learning_rate_rises_and_falls():
    factors = [learning_rate_factor(step, 20, 0.1) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in pairwise(factors[2:])) and factors[-1] < 0.02


def test_resume_is_refused_with_other_settings(rows, tmp_path, monkeypatch):
    def stop(*_):
        raise Interrupted

    monkeypatch.setattr(Loop, "step", stop)
    with pytest.raises(Interrupted):
        train(config(rows, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"began with, but it had --batch-size 4\.$"):
        train(config(rows, tmp_path / "out", batch_size=8, resume=True))
    with pytest.raises(ValueError, match="is not empty: name a new folder, or add --resume"):
        train(config(rows, tmp_path / "out"))


def test_a_finished_run_is_not_resumed_and_an_unfinished_one_is_no_model(finished, rows, tmp_path):
    settings = json.loads((finished / "config.json").read_text())["dpo_wrapper"]
    with pytest.raises(ValueError, match="is finished"):
        RunFolder(config(Path(settings["data"]), finished)).check(resume=True)
    with pytest.raises(ValueError, match="holds no run that could go on"):
        RunFolder(config(rows, tmp_path / "nothing")).check(resume=True)
    RunFolder(config(rows, tmp_path / "begun")).open()
    with pytest.raises(ValueError, match="has not finished"):
        load_policy(str(tmp_path / "begun"), None, 128)


@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_model_by_folder_with_its_tokenizer(rows, tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import hugging_face
    finally:
        sys.path.pop(0)
    base = tmp_path / "base"
    hugging_face.build(base)
    if tied:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings = LlamaConfig.from_pretrained(base)
        settings.tie_word_embeddings = True
        LlamaForCausalLM(settings).save_pretrained(base)
    out = tmp_path / "out"
    train(config(rows, out, model=str(base), lr=1e-2, loss="sigmoid + 0.5*sft", sft_epochs=None))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, out))
    assert {r["stage"] for r in records(out)} == {"dpo"}
    assert records(out)[-1]["rewards/accuracies"] > 0.8
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert load_policy(str(out), None, 128).tokenizer.vocab_size == before.config.vocab_size


def test_without_held_out_rows_there_is_still_a_summary(rows, tmp_path, capsys):
    path = tmp_path / "all.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()[:8]]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "split"}) + "\n" for r in lines))
    train(config(path, tmp_path / "out", eval_fraction=0.0, epochs=1))
    printed = capsys.readouterr().out
    assert "8 training and 0 held-out pairs" in printed and "training before" in printed
    assert "reference" in printed and "policy" in printed
