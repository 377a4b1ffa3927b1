"""`dpo-wrapper evaluate`: its figures, its files, what it says, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

from dpo_wrapper.cli import main
from dpo_wrapper.commands.evaluate.answers import Answers
from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.evaluate.run_evaluation import run_evaluation
from dpo_wrapper.data import load_tokenizer
from dpo_wrapper.pretrained import PretrainedModel, load_pretrained, save_pretrained
from helpers.lora_runs import save_llama
from helpers.oracle import sequence_score, to_float64
from helpers.runs import ROOT, InterruptedRunError, read_metrics

FEW = {"resamples": 100, "cpu": True}
ACCURACY = "rewards/accuracies"


def make_evaluation(model, data, out=None, **options):
    return EvaluateConfig(model=str(model), data=data, out=out, **(FEW | options))


def read_lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def subsets(tmp_path_factory):
    """Rows as RewardBench has them: pairs of two subsets, of which one prompt comes twice."""
    path = tmp_path_factory.mktemp("data") / "bench.jsonl"
    rows = [
        {"prompt": f"Say {word}.", "chosen": word, "rejected": other, "subset": subset, "id": k}
        for k, (word, other, subset) in enumerate(
            [("a", "bb", "short"), ("a", "c", "short"), ("dd", "e", "long"), ("fff", "g", "long")]
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("other") / "base", tie_word_embeddings=True)


@pytest.mark.parametrize("kind", ["lora_run", "staged_run"])
def test_the_figures_of_a_run_are_those_of_its_own_last_evaluation(kind, rows, tmp_path, request, capsys):
    """The rows that are marked as test, with the run's own length, loss and reference."""
    run = request.getfixturevalue(kind)
    last = next(record for record in reversed(read_metrics(run)) if record["part"] == "eval")
    content = run_evaluation(make_evaluation(run, rows, tmp_path / "out"))
    figures = content["figures"]
    assert content["pairs"] == last["pairs/valid"]
    names = {ACCURACY, "rewards/margins", "rewards/chosen", "logps/rejected", "length/chosen"}
    for name in names:
        assert figures[name]["value"] == pytest.approx(last[name], rel=1e-3, abs=1e-4), name
    if kind == "lora_run":
        assert figures["logratios/chosen"]["value"] == pytest.approx(last["kl/chosen"], rel=1e-3, abs=1e-4)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == content
    assert content["settings"]["max_length"] == 128
    said = capsys.readouterr().out
    assert "as in the run: --max-length 128." in said and "rows are left out, for they are not marked" in said
    assert content["conclusions"][0] in said and content["reference"] in said
    lines = read_lines(tmp_path / "out" / "scores.jsonl")
    assert sum(line["rewards/margins"] for line in lines) / len(lines) == pytest.approx(
        figures["rewards/margins"]["value"]
    )


def test_scores_are_those_of_the_oracle(llama, other, subsets, tmp_path):
    """A plain folder and a reference that is named; rewards are 0.1 times the log-ratios."""
    content = run_evaluation(make_evaluation(llama, subsets, tmp_path / "out", reference=str(other)))
    policy, reference = (to_float64(load_pretrained(str(one), None, 64).model) for one in (llama, other))
    tokenizer = load_tokenizer("bytes")
    lines = read_lines(tmp_path / "out" / "scores.jsonl")
    for row, line in zip(read_lines(subsets), lines, strict=True):
        prompt = tokenizer.encode_prompt(row["prompt"])
        for side in ("chosen", "rejected"):
            ids = torch.tensor([*prompt, *row[side].encode(), tokenizer.eos_id])
            is_prompt = torch.arange(len(ids)) < len(prompt)
            rest = (ids, is_prompt, torch.ones_like(is_prompt))
            sums = [sequence_score(one, *rest) for one in (policy, reference)]
            assert line[f"logps/{side}"] == pytest.approx(float(sums[0][0]), abs=1e-4)
            assert line[f"logps/ref_{side}"] == pytest.approx(float(sums[1][0]), abs=1e-4)
            assert line[f"length/{side}"] == sums[0][1]
            expected = 0.1 * float(sums[0][0] - sums[1][0])
            assert line[f"rewards/{side}"] == pytest.approx(expected, abs=1e-4)
    assert content["prompts"] == 3
    assert [(name, one["pairs"]) for name, one in content["subsets"].items()] == [("long", 2), ("short", 2)]
    accuracies = [one["figures"][ACCURACY]["value"] for one in content["subsets"].values()]
    assert content["figures"][ACCURACY]["value"] == sum(accuracies) / 2
    assert content["notes"] == ["Columns that were not used: id."]


def test_every_figure_is_in_the_documentation(llama, subsets, tmp_path):
    """A figure of the rejected side is named by that of the chosen one."""
    options = {"reference": str(llama), "num_samples": 1, "max_new_tokens": 1}
    content = run_evaluation(make_evaluation(llama, subsets, tmp_path / "out", **options))
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    names = [*content["figures"], *content["answers"]["figures"]]
    assert [name for name in names if f"`{name.replace('rejected', 'chosen')}`" not in page] == []
    assert content["conclusions"][0].startswith("Every pair is a tie within rounding")


def test_memory_that_does_not_suffice_is_told(llama, subsets, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dpo_wrapper.commands.evaluate.run_evaluation.score_completions", fail)
    with pytest.raises(ValueError, match="but it does not: lower --micro-batch-tokens"):
        run_evaluation(make_evaluation(llama, subsets))


def test_without_a_reference_the_reward_is_the_log_prob_per_token(llama, subsets, tmp_path, capsys):
    content = run_evaluation(make_evaluation(llama, subsets, tmp_path / "out"))
    assert "reward: the log-prob per token, for there is no reference." in capsys.readouterr().out
    for line in read_lines(tmp_path / "out" / "scores.jsonl"):
        assert line["rewards/chosen"] == pytest.approx(line["logps/chosen"] / line["length/chosen"], rel=1e-4)
    assert not any(name.startswith(("calibration", "logratios")) for name in content["figures"])


def test_a_loss_without_rewards_has_those_of_dpo_where_there_is_a_reference(llama, other, subsets, capsys):
    run_evaluation(make_evaluation(llama, subsets, reference=str(other), loss="sft"))
    assert (
        "reward: 0.1 times the log-ratio of model and reference, for sft has none." in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="--loss sft needs a reference"):
        run_evaluation(make_evaluation(llama, subsets, loss="sft"))


def test_the_same_command_gives_the_same_figures_and_other_settings_are_refused(llama, subsets, tmp_path):
    config = make_evaluation(llama, subsets, tmp_path / "out")
    assert run_evaluation(config) == run_evaluation(config)
    with pytest.raises(ValueError, match=r"but .* holds evaluation\.json of something else"):
        run_evaluation(replace(config, seed=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out should be a folder, but"):
        run_evaluation(replace(config, out=tmp_path / "file"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "samples.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"holds samples\.jsonl of something else"):
        run_evaluation(replace(config, out=tmp_path / "taken"))


@pytest.fixture
def brevity(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text("def brevity(prompt, completion): return -len(completion)\n")
    return f"{path}:brevity"


def test_answers_are_judged_and_their_kl_is_estimated(lora_run, llama, rows, tmp_path, brevity):
    options = {"judge": brevity, "num_samples": 3, "max_new_tokens": 6}
    content = run_evaluation(make_evaluation(lora_run, rows, tmp_path / "out", **options))
    samples, answers = read_lines(tmp_path / "out" / "samples.jsonl"), content["answers"]
    assert [set(sample["judge"]) for sample in samples] == [{"policy", "reference"}] * 3
    pairs = [(len(sample["policy"]), len(sample["reference"])) for sample in samples]
    wins = [0.5 if one == two else float(one < two) for one, two in pairs]
    assert answers["win_rate"]["raw"]["value"] == pytest.approx(sum(wins) / 3)
    tokenizer, kl = load_tokenizer("bytes"), []
    models = [to_float64(load_pretrained(str(one), None, 64).model) for one in (lora_run, llama)]
    for sample in samples:
        prompt = tokenizer.encode_prompt(sample["prompt"])
        ids = torch.tensor([*prompt, *sample["policy_ids"]])
        is_prompt = torch.arange(len(ids)) < len(prompt)
        sums = [sequence_score(one, ids, is_prompt, torch.ones_like(is_prompt))[0] for one in models]
        kl.append(float(sums[0] - sums[1]))
    assert answers["figures"]["kl/samples"]["value"] == pytest.approx(sum(kl) / 3, abs=1e-3)
    assert answers["figures"]["kl/samples_k3"]["value"] >= 0
    assert any("judge" in sentence for sentence in content["conclusions"])


def interrupt(*_):
    raise KeyboardInterrupt


def test_answers_that_were_interrupted_go_on_to_the_same_file(llama, rows, tmp_path, brevity, monkeypatch):
    monkeypatch.setattr("dpo_wrapper.commands.evaluate.answers.CHUNK_SIZE", 2)
    options = {"judge": brevity, "num_samples": 5, "max_new_tokens": 4}
    whole = run_evaluation(make_evaluation(llama, rows, tmp_path / "whole", **options))
    config, answer, starts = make_evaluation(llama, rows, tmp_path / "parts", **options), Answers.answer, []

    def interrupted(self, start):
        starts.append(start)
        if len(starts) == 3:
            raise InterruptedRunError
        return answer(self, start)

    monkeypatch.setattr(Answers, "answer", interrupted)
    with pytest.raises(InterruptedRunError):
        run_evaluation(config)
    written = json.loads((tmp_path / "parts" / "evaluation.json").read_text())
    assert written["status"] == "answering" and written["figures"] == whole["figures"]
    file = tmp_path / "parts" / "samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    file.write_text("".join(lines[:3]) + lines[3][:20])  # half of a chunk, and half of a line
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("dpo_wrapper.commands.evaluate.run_evaluation.score_completions", interrupt)
        run_evaluation(config)  # which is killed while it scores the pairs again
    assert run_evaluation(config)["answers"] == whole["answers"] and starts == [0, 2, 4, 2, 4]
    one, other = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "parts"))
    assert one == other
    first = read_lines(tmp_path / "parts" / "samples.jsonl")[0]
    assert set(first["judge"]) == {"policy", "chosen"}


@pytest.mark.slow
def test_prepared_data_gives_the_figures_of_its_files(llama, rows, tmp_path):
    main(["prepare", "--data", str(rows), "--out", str(tmp_path / "prepared"), "--max-length", "128"])
    raw = run_evaluation(make_evaluation(llama, rows, max_length=128))
    prepared = run_evaluation(make_evaluation(llama, tmp_path / "prepared"))
    assert prepared["figures"] == raw["figures"]
    assert prepared["settings"]["max_length"] == raw["settings"]["max_length"] == 128
    with pytest.raises(ValueError, match="--judge should be given with files"):
        run_evaluation(make_evaluation(llama, tmp_path / "prepared", tmp_path / "out", judge="math:floor"))


@pytest.mark.slow
def test_rows_that_the_run_was_trained_on_are_left_out(rows, llama, tmp_path):
    from dpo_wrapper.training.train import train
    from helpers.runs import QUICK, make_config

    unmarked = tmp_path / "rows.jsonl"
    records = [{k: v for k, v in row.items() if k != "split"} for row in read_lines(rows)]
    unmarked.write_text("".join(json.dumps(row) + "\n" for row in records))
    options = QUICK | {"model": str(llama), "sft_epochs": 0, "eval_fraction": 0.3}
    train(make_config(unmarked, tmp_path / "run", **options))
    content = run_evaluation(make_evaluation(tmp_path / "run", unmarked))
    last = next(record for record in reversed(read_metrics(tmp_path / "run")) if record["part"] == "eval")
    assert content["figures"]["logps/chosen"]["value"] == pytest.approx(last["logps/chosen"], rel=1e-4)
    assert any("in the training data of the run" in note for note in content["notes"])


def test_what_cannot_be_evaluated_is_refused(llama, rows, tmp_path, subsets):
    from transformers import GPT2Config, GPT2LMHeadModel

    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Only a document."}\n')
    with pytest.raises(ValueError, match=r"has none \(1 rows are left out, for they have no two completions"):
        run_evaluation(make_evaluation(llama, texts))
    with pytest.raises(ValueError, match="--loss ipo needs a reference, but there is none"):
        run_evaluation(make_evaluation(llama, subsets, loss="ipo"))
    tokenizer = load_tokenizer("bytes")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=263, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    short = tmp_path / "short"
    save_pretrained(PretrainedModel(model, tokenizer, "bytes", None), model, short)
    with pytest.raises(ValueError, match="--max-length should be at most 17"):
        run_evaluation(make_evaluation(llama, rows, reference=str(short)))
    with pytest.raises(ValueError, match="--against reference needs a reference, but there is none"):
        options = {"judge": "math:floor", "against": "reference"}
        run_evaluation(make_evaluation(llama, subsets, tmp_path / "out", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "x:y"}, "--judge should be given together with --out"),
        ({"num_samples": 4}, "--num-samples should be given together with --out"),
        ({"against": "chosen"}, "--against should be given together with --judge"),
        ({"temperature": 0.5}, "--temperature is of the answers to prompts, but none are asked for"),
        ({"temperature": -1.0}, "--temperature should be 0 or more"),
        ({"resamples": 10}, "--resamples should be at least 100, but it is 10"),
        ({"max_length": 2}, "--max-length should be an integer of at least 8"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(model="m", data="d", **options)


def test_the_command_ends_with_its_status(llama, subsets, capsys):
    main(["evaluate", str(llama), "--data", str(subsets), "--resamples", "100", "--cpu"])
    out = capsys.readouterr().out
    assert "reward accuracy" in out and "95% interval" in out and "short" in out
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "tiny", "--data", str(subsets)])
    assert end.value.code == 2
    assert "dpo-wrapper: the model should be trained" in capsys.readouterr().err.replace("error: ", "")
