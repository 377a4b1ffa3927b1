"""The command on a tiny model: which samples it writes, and which answers meet in a row."""

import json

import pytest
import torch

from dpo_wrapper import cli
from dpo_wrapper.data import ByteTokenizer, Message, read_examples, tokenize_examples
from dpo_wrapper.pretrained import PretrainedModel, load_pretrained, save_pretrained
from dpo_wrapper.training.train import train
from helpers.lora_runs import make_lora_config
from helpers.models import hf_llama
from helpers.pairs import LOGS, NEW_TOKENS, PROMPTS, write_rows
from helpers.runs import BUNDLED

BYTES = ByteTokenizer()


def sample_alone(model, prompt, seed, **options):
    """What transformers samples for one prompt after `torch.manual_seed`, as text."""
    ids = torch.tensor([BYTES.encode_prompt(prompt)])
    torch.manual_seed(seed)
    options = {
        "do_sample": True,
        "top_k": 0,
        "eos_token_id": BYTES.eos_id,
        "pad_token_id": BYTES.pad_id,
    } | options
    return BYTES.decode(model.generate(ids, max_new_tokens=NEW_TOKENS, **options)[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize(
    "options", ({}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}), ids=("plain", "all")
)
def test_each_sample_is_what_transformers_draws_by_its_seed(make, model, options):
    rows, llama = make(**options), load_pretrained(str(model), None, 64).model.eval()
    assert [row["provenance"]["source"] for row in rows] == [f"logs.jsonl, line {k + 1}" for k in range(6)]
    for row, prompt in zip(rows, PROMPTS, strict=True):
        [_, origin] = row["provenance"]["completions"]
        if prompt == "a":
            assert row["chosen"] == [{"role": "assistant", "content": "answer 2"}] and row["split"] == "test"
            turns = (Message("user", "a"),)
            expected = sample_alone(llama, turns, origin["seed"], **options).strip()
            assert row["rejected"] == [{"role": "assistant", "content": expected}]
        else:
            assert row["rejected"] == sample_alone(llama, prompt, origin["seed"], **options)
    assert len({row["provenance"]["completions"][1]["seed"] for row in rows}) == 6


def test_the_rows_say_where_they_come_from(make, model):
    row = make(seed=5)[1]
    [log, sample] = row["provenance"].pop("completions")
    assert row["provenance"] == {
        "source": "logs.jsonl, line 2",
        "model": str(model),
        "sample_from": "policy",
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": NEW_TOKENS, "seed": 5},
    }
    assert log == {"from": "log"} and sample.keys() == {"from", "seed", "is_cut"}


def test_another_seed_gives_other_samples_and_other_batches_the_same(make, tmp_path):
    first = make()
    assert make("again.jsonl", seed=1) != first
    write_rows(tmp_path / "logs.jsonl", LOGS[:3])
    assert [row["rejected"] for row in make("few.jsonl")] == [row["rejected"] for row in first[:3]]


def test_greedy_answers_have_no_seed(make, model):
    rows, llama = make(temperature=0.0), load_pretrained(str(model), None, 64).model.eval()
    assert rows[1]["rejected"] == sample_alone(llama, PROMPTS[1], 0, do_sample=False, top_k=None)
    assert rows[1]["provenance"]["completions"][1]["seed"] is None


def test_what_is_written_is_trained_on_and_prepared_without_any_option(make, model, tmp_path, capsys):
    make()
    file = tmp_path / "pairs.jsonl"
    read = read_examples(file, kind="auto")
    assert read.forms == {"pair": 6} and len(tokenize_examples(read.examples, BYTES, 128).examples) == 6
    cli.main(["prepare", "--data", str(file)])
    assert "6 read (6 pair)" in capsys.readouterr().out


@pytest.mark.slow
def test_the_training_command_takes_the_file(make, model, rules, tmp_path):
    make(judge=f"{rules}:size", keep="list")
    out = tmp_path / "run"
    cli.main(
        ["train", "--data", str(tmp_path / "pairs.jsonl"), "--model", str(model), "--out", str(out), "--cpu"]
    )
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


def test_a_judge_orders_the_samples(make, rules):
    pairs = make(judge=f"{rules}:size", num_samples=3)
    lists = make("lists.jsonl", judge=f"{rules}:size", num_samples=3, keep="list")
    assert len(pairs) == len(lists) and any(len(row["completions"]) == 3 for row in lists)
    for pair, ranked in zip(pairs, lists, strict=True):
        texts = [text if isinstance(text, str) else text[0]["content"] for text in ranked["completions"]]
        assert ranked["scores"] == sorted(map(len, texts), reverse=True) == list(map(len, texts))
        assert pair["chosen"] == ranked["completions"][0]
        assert len(pair["rejected"]) == len(ranked["completions"][-1]) or not isinstance(
            pair["rejected"], str
        )
        assert pair["provenance"]["judge"] == f"{rules}:size"
        assert [one["score"] for one in ranked["provenance"]["completions"]] == ranked["scores"]


def test_prompts_without_a_pair_are_counted_and_said(make, rules, capsys):
    with pytest.raises(
        ValueError, match="they give none: 6 of 6 prompts give no pair: all samples are equal or tied"
    ):
        make(judge=f"{rules}:same", num_samples=2)
    rows = make("first.jsonl")
    equal = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in rows[:2]]
    capsys.readouterr()
    assert len(make("second.jsonl", data=(write_rows(rules.with_name("logs.jsonl"), equal + LOGS[2:]),))) == 4
    printed = capsys.readouterr().out
    assert "second.jsonl has 4 pairs." in printed
    assert "2 of 6 prompts give no pair: the sample equals the recorded answer." in printed
    assert "sampled answers are cut at --max-new-tokens 6." in printed


def test_long_prompts_are_treated_as_the_options_say(make, capsys):
    assert len(make(max_length=14)) == 6  # 8 tokens of a prompt: BOS and 7 bytes
    assert (
        "1 of 6 prompts have more than 8 tokens, of which the model sees the last." in capsys.readouterr().out
    )
    assert len(make("dropped.jsonl", max_length=14, on_long="drop")) == 5
    assert "1 of 6 prompts have more than 8 tokens and are left out." in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"logs.jsonl, line 2: a prompt should have at most 8 tokens"):
        make("refused.jsonl", max_length=14, on_long="error")


def test_prepared_data_is_refused(make, logs, tmp_path, capsys):
    cli.main(["prepare", "--data", str(logs), "--out", str(tmp_path / "prepared"), "--workers", "1"])
    with pytest.raises(ValueError, match=r"logs should be files of rows, but .*prepared is prepared data"):
        make(data=(tmp_path / "prepared",))


def test_memory_that_does_not_suffice_is_told_in_a_sentence(make, monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dpo_wrapper.commands.pairs.samples.generate", run_out)
    with pytest.raises(ValueError, match=r"keys and values of 4 answers of 6 tokens .*: lower --batch-size"):
        make()


def test_a_model_that_computes_padding_otherwise_answers_lengths_apart(make, model, monkeypatch, capsys):
    expected = make()
    monkeypatch.setattr("dpo_wrapper.commands.pairs.samples.computes_padding_alike", lambda *_: False)
    assert make("apart.jsonl") == expected
    assert "prompts of different lengths are answered apart" in capsys.readouterr().out


def test_tokens_that_the_model_does_not_know_are_refused(make, tmp_path):
    model = hf_llama(0)
    save_pretrained(PretrainedModel(model, BYTES, "bytes", None), model, tmp_path / "small")
    with pytest.raises(ValueError, match=r"logs.jsonl, line 1: token ids should be below 37"):
        make(model=str(tmp_path / "small"))


# the reference


def test_the_reference_of_a_model_that_is_no_run_is_refused(make, model):
    with pytest.raises(ValueError, match=f"but that of {model} is none, for .* is no training run"):
        make(sample_from="reference")


@pytest.mark.slow
def test_a_run_with_an_adapter_is_sampled_with_it_and_without(make, model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(BUNDLED.read_text().splitlines(keepends=True)[:8]))
    train(make_lora_config(rows, tmp_path / "run", model, samples=0, eval_fraction=0.0))
    base = [row["rejected"] for row in make("base.jsonl")]
    off = make("off.jsonl", model=str(tmp_path / "run"), sample_from="reference")
    capsys.readouterr()
    on = make("on.jsonl", model=str(tmp_path / "run"))
    assert "as in the run: --max-length 128." in capsys.readouterr().out
    assert [row["rejected"] for row in off] == base != [row["rejected"] for row in on]
    assert off[0]["provenance"]["reference"].endswith("with the adapter switched off.")
    judged = make(
        "judged.jsonl", model=str(tmp_path / "run"), judge=f"implicit:{tmp_path / 'run'}", num_samples=2
    )
    [best, worst] = [one["score"] for one in judged[0]["provenance"]["completions"]]
    assert best > worst
