"""Training on prepared data, which is training on the files that it was made of."""

import json
from dataclasses import replace
from datetime import date

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_wrapper import cli
from dpo_wrapper.data.prepare import job
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.data.prepare.run import prepare_data
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import train
from helpers import tokenizers as tiny
from helpers.curves import rendered_curves
from helpers.datasets import write_rows
from helpers.runs import (
    assert_metrics_close,
    interrupt_training,
    make_config,
    read_metrics,
    train_in_two_processes,
)

PAIRS = [{"prompt": f"{k}+{k}?", "chosen": str(2 * k), "rejected": f"no, {k}"} for k in range(12)]
LISTS = [{"prompt": f"{k}-{k}?", "completions": ["0", "null", f"{k}"], "scores": [2, 1, 1]} for k in range(5)]
LABELS = [{"prompt": f"{k}*{k}?", "completion": str(k * k), "label": k % 2 == 0} for k in range(9)]
SFT = [{"prompt": f"{k}/1?", "completion": f"{k}"} for k in range(8)]
DOCUMENTS = [{"text": f"{k} and {k} make {2 * k}. " * 9} for k in range(6)]


def prepare(data, out, **options):
    return prepare_data(PrepareConfig(data=data, out=out, workers=1, **({"max_length": 128} | options)))


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        ("sigmoid", [*PAIRS, *LISTS]),
        ("plackettluce", [*PAIRS, *LISTS]),
        ("kto", [*PAIRS, *LABELS]),
        ("sigmoid", [{**row, "margin": k / 4, "weight": 2} for k, row in enumerate(PAIRS)]),
    ],
    ids=["pairs and lists", "lists", "labels and pairs", "margins"],
)
def test_every_example_is_that_of_the_raw_file(tmp_path, loss, rows):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    prepare(file, tmp_path / "prepared")
    raw, prepared = (
        set_up_training(make_config(data, tmp_path / "out", loss=loss, eval_fraction=0.3))
        for data in (file, tmp_path / "prepared")
    )
    assert [plan.name for plan in raw.stages] == [plan.name for plan in prepared.stages] == ["sft", "dpo"]
    for one, other in zip(raw.stages, prepared.stages, strict=True):
        assert list(one.splits.train) == list(other.splits.train) and len(one.splits.train)
        assert list(one.splits.eval) == list(other.splits.eval) and len(one.splits.eval)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_metrics_are_those_of_the_raw_file(rows, finished_run, tmp_path, num_workers):
    prepare(rows, tmp_path / "prepared")
    train(make_config(tmp_path / "prepared", tmp_path / "out", num_workers=num_workers))
    assert read_metrics(tmp_path / "out") == read_metrics(finished_run)
    weights = [folder / "model.safetensors" for folder in (finished_run, tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_two_processes_report_what_one_does(rows, finished_run, tmp_path):
    prepare(rows, tmp_path / "prepared")
    out = tmp_path / "out"
    train_in_two_processes(tmp_path / "script.py", tmp_path / "prepared", out)
    assert_metrics_close(read_metrics(finished_run), read_metrics(out))


def test_rows_that_the_loss_has_no_use_for_are_left_out_if_that_is_asked_for(tmp_path):
    prepare(write_rows(tmp_path / "rows.jsonl", [*LISTS, *LABELS, *PAIRS]), tmp_path / "prepared")
    options = {"eval_fraction": 0.0, "sft_epochs": 0}
    for loss, count, left_out in (("sigmoid", 12 + 5 * 2, 9), ("kto", 24 + 9, 5)):
        config = make_config(tmp_path / "prepared", tmp_path / "out", loss=loss, **options)
        with pytest.raises(ValueError, match=r"or leave such rows out \(--on-bad-row skip\)"):
            set_up_training(config)
        setup = set_up_training(replace(config, on_bad_row="skip"))
        assert len(setup.stages[-1].splits.train) == count
        note = f"{left_out} rows are of no use to --loss and are left out"
        assert any(text.startswith(note) for text in setup.notes)


def write_files(folder):
    kinds = {"documents": DOCUMENTS, "sft": SFT, "pairs": PAIRS}
    return tuple(write_rows(folder / f"{name}.jsonl", rows) for name, rows in kinds.items())


def test_stages_take_the_rows_of_their_kind(tmp_path):
    prepare(write_files(tmp_path), tmp_path / "prepared")

    def plan(**options):
        config = make_config(tmp_path / "prepared", tmp_path / "out", eval_fraction=0.0, **options)
        setup = set_up_training(config)
        stages = []
        for plan in setup.stages:
            sequences = [(one.prompt, *one.completions[:1]) for one in plan.splits.train]
            texts = ["".join(map(setup.pretrained.tokenizer.decode, ids)) for ids in sequences]
            stages.append((plan.name, plan.splits.unit, texts))
        return stages

    texts = {
        "pretrain": [row["text"] for row in DOCUMENTS],
        "sft": [row["prompt"] + row["completion"] for row in SFT],
        "dpo": [row["prompt"] + row["chosen"] for row in PAIRS],
    }
    stages = plan()
    assert [name for name, _, _ in stages] == ["pretrain", "sft", "dpo"]
    assert [unit for _, unit, _ in stages] == ["documents", "completions", "pairs"]
    assert "".join(stages[0][2]) == "".join(texts["pretrain"]) and len(stages[0][2]) > len(DOCUMENTS)
    assert [stage[2] for stage in stages[1:]] == [texts["sft"], texts["dpo"]]
    assert [stage[0] for stage in plan(stage=("sft", "dpo"))] == ["sft", "dpo"]
    assert [stage[0] for stage in plan(sft_epochs=0)] == ["pretrain", "dpo"]
    assert [stage[0] for stage in plan(epochs=0)] == ["pretrain", "sft"]


def test_preferences_alone_are_learned_as_documents_and_as_completions(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*PAIRS, *LABELS])
    options = {"loss": "kto", "eval_fraction": 0.0, "sft_epochs": None}

    def scored_texts(**more):
        setup = set_up_training(make_config(file, tmp_path / "out", **options, **more))
        return {
            plan.name: [
                "".join(map(setup.pretrained.tokenizer.decode, [
                    [k for k, is_scored in zip(one.prompt + ids, mask, strict=True) if is_scored]
                    for ids, mask in zip(one.completions, one.scored_masks(), strict=True)
                ]))
                for one in plan.splits.train
            ]
            for plan in setup.stages
        }  # fmt: skip

    good = [*((row["prompt"], row["chosen"]) for row in PAIRS)]
    good += [(row["prompt"], row["completion"]) for row in LABELS if row["label"]]
    both, answers = [prompt + answer for prompt, answer in good], [answer for _, answer in good]
    assert scored_texts()["sft"] == both  # a new model
    assert scored_texts(train_on_prompt=False)["sft"] == answers
    stages = scored_texts(stage=("pretrain", "sft", "dpo"))
    assert stages["pretrain"] == both and stages["sft"] == answers
    assert len(stages["dpo"]) == 2 * len(PAIRS) + len(LABELS)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            SFT,
            {"stage": ("dpo",)},
            r"--stage dpo should have preferences, but the data holds prompt_completion alone",
        ),
        (
            SFT,
            {"epochs": 3, "loss": "simpo"},
            r"--loss is an option of the stage dpo, but the stages of this run are sft",
        ),
        (SFT, {}, r"--epochs is an option of the stage dpo, but .* are sft: give --sft-epochs\."),
        (SFT, {"sft_epochs": 0}, r"--sft-epochs should not be 0 for data of prompt_completion alone"),
        (
            PAIRS,
            {"stage": ("dpo",), "sft_learning_rate": 1e-3},
            r"--sft-learning-rate is an option of the stage sft",
        ),
        (
            SFT,
            {"train_on_prompt": True, "epochs": 3},
            r"--train-on-prompt acts where preferences are",
        ),
        (
            PAIRS,
            {"stage": ("sft",), "sft_epochs": 0, "epochs": 3},
            r"--sft-epochs should not be 0 if --stage",
        ),
        (PAIRS, {"stage": ("sft", "dpo"), "epochs": 0}, r"--epochs should not be 0 if --stage names dpo"),
        (PAIRS, {"sft_epochs": 0, "epochs": 0}, r"--epochs should not be 0 where no other stage is left"),
        (PAIRS, {"pretrain_epochs": 3}, r"--pretrain-epochs is an option of the stage pretrain"),
        (PAIRS, {"stage": ("dpo", "sft")}, r"--stage should name stages in the order pretrain, sft, dpo"),
        (PAIRS, {"stage": ()}, r"--stage should name stages in the order pretrain, sft, dpo"),
        ([*PAIRS, SFT[0]], {}, r"a file should hold rows of one kind"),
    ],
)
def test_stages_that_cannot_be(tmp_path, rows, options, message):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        set_up_training(make_config(file, tmp_path / "out", **({"sft_epochs": None} | options)))


def test_prepared_data_of_another_tokenizer_template_or_option_is_refused(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", PAIRS)
    model = tmp_path / "model"
    tiny.save_tokenizer(model, eos="<|im_end|>", template=tiny.CHATML)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_positions=256, n_embd=8, n_layer=1, n_head=1)
    ).save_pretrained(model)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    prepare(file, tmp_path / "prepared", tokenizer=str(model))

    def set_up(data, **options):
        return set_up_training(make_config(data, tmp_path / "out", **({"model": str(model)} | options)))

    set_up(tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"the model's own tokenizer, but it was made with another"):
        set_up(tmp_path / "prepared", model="tiny")
    prepare(file, tmp_path / "other", tokenizer=str(model), chat_template=tmp_path / "t.jinja")
    with pytest.raises(ValueError, match=r"the model's own chat template, but it was made with another"):
        set_up(tmp_path / "other")
    set_up(tmp_path / "other", chat_template=tmp_path / "t.jinja")
    tiny.save_tokenizer(tmp_path / "larger", eos="<|im_end|>", template=tiny.CHATML, pad="<other>")
    with pytest.raises(ValueError, match=r"the model's own tokenizer, but it was made with another, that of"):
        set_up(tmp_path / "prepared", tokenizer=str(tmp_path / "larger"))
    with pytest.raises(
        ValueError, match=r"--max-length should be that of the prepared data, 128, but it is 64"
    ):
        set_up(tmp_path / "prepared", max_length=64)
    with pytest.raises(
        ValueError, match=r"--on-long should be that of the prepared data, cut, but it is drop"
    ):
        set_up(tmp_path / "prepared", on_long="drop")
    with pytest.raises(ValueError, match=r"prepared data should be the only --data, but .* is one of 2"):
        set_up((tmp_path / "prepared", file))
    assert set_up(tmp_path / "prepared", eval_data=file).stages[-1].splits.eval

    manifest = tmp_path / "prepared" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(
        ValueError, match="should be prepared data of version 1, but it has version 99: prepare it"
    ):
        set_up(tmp_path / "prepared")
    manifest.write_text(json.dumps(content))
    data = tmp_path / "prepared" / "data-00000.arrow"
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"data-00000.arrow should have [\d,]+ bytes, but it has"):
        set_up(tmp_path / "prepared")
    manifest.unlink()
    (tmp_path / "prepared" / "work-1").mkdir()
    (tmp_path / "prepared" / "work-1" / "date").touch()
    with pytest.raises(ValueError, match=r"holds no manifest.json: run dpo-wrapper prepare --out"):
        set_up(tmp_path / "prepared")


def test_the_date_of_a_template_is_that_of_preparation(tmp_path, monkeypatch):
    class Earlier(date):
        @classmethod
        def today(cls):
            return cls(2021, 2, 3)

    model = tmp_path / "model"
    tiny.save_tokenizer(model, eos="<|im_end|>", template="{{ strftime_now('%Y') }}" + tiny.CHATML)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_positions=256, n_embd=8, n_layer=1, n_head=1)
    ).save_pretrained(model)
    with monkeypatch.context() as patch:
        patch.setattr(job, "date", Earlier)
        data = prepare(
            write_rows(tmp_path / "rows.jsonl", PAIRS), tmp_path / "prepared", tokenizer=str(model)
        )
    assert data.manifest["template"] == {"date": "2021-02-03"}
    setup = set_up_training(make_config(tmp_path / "prepared", tmp_path / "out", model=str(model)))
    decode, (example, *_) = setup.pretrained.tokenizer.decode, setup.stages[-1].splits.train
    assert decode(example.prompt).startswith("2021") and setup.run.record.today == "2021-02-03"


@pytest.mark.slow
def test_three_stages_in_sequence_and_resumed(tmp_path, capsys):
    prepare(write_files(tmp_path), tmp_path / "prepared")
    arguments = {"sft_epochs": 2, "epochs": 1, "batch_size": 4, "save_steps": 1}
    whole = train(make_config(tmp_path / "prepared", tmp_path / "whole", **arguments))
    assert (whole.path / "pretrain" / "model.safetensors").is_file() and (whole.path / "sft").is_dir()
    stages = [record["stage"] for record in whole.log.read()]
    assert list(dict.fromkeys(stages)) == ["pretrain", "sft", "dpo"]
    for stage in ("pretrain", "sft", "dpo"):
        out = tmp_path / stage
        with interrupt_training(stage, after_steps=1):
            train(make_config(tmp_path / "prepared", out, **arguments))
        train(make_config(tmp_path / "prepared", out, resume=True, **arguments))
        assert read_metrics(out) == read_metrics(whole.path)
        weights = [folder / "model.safetensors" for folder in (whole.path, out)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("sft", SFT, ()),
        ("pretrain", DOCUMENTS, ()),
        ("pretrain", PAIRS, ("--stage", "pretrain")),
        ("sft", DOCUMENTS, ("--stage", "sft", "--sft-epochs", "2")),
    ],
)
def test_one_stage_alone(tmp_path, capsys, name, rows, options):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    sizes = ("--batch-size", "2", "--max-length", "64")
    with rendered_curves():
        cli.main(["train", "--data", str(file), "--out", str(tmp_path / "out"), "--cpu", *sizes, *options])
    text = capsys.readouterr().out
    assert f"{name}: " in text and "reference" not in text and "loss" in text
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5_000
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["status"] == "finished"
    losses = [r["loss"] for r in read_metrics(tmp_path / "out") if r["part"] == "eval"]
    assert losses[-1] < losses[0]
