"""What a run says of its data and refuses before it starts."""

import json
from datetime import date
from pathlib import Path

import pytest
import torch

from dpo_wrapper.training import run_record
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.setup import set_up_training
from helpers import tokenizers as tiny
from helpers.datasets import write_rows
from helpers.runs import make_config

PAIRS = [{"prompt": f"{k}+{k}?", "chosen": str(2 * k), "rejected": "no"} for k in range(8)]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A GPT-2 of 64 positions and fewer embeddings than its tokenizer has ids."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tiny.save_tokenizer(folder, eos="<|im_end|>", template=tiny.CHATML)
    config = GPT2Config(vocab_size=400, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_notes_on_rows_and_columns(tmp_path):
    rows = [{**row, "margin": 0.5, "chosen": " " + row["chosen"], "judge": "j"} for row in PAIRS]
    rows += [{"prompt": "Q", "response_a": "A", "response_b": "B", "winner": "tie"}]
    notes = set_up_training(make_config(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out")).notes
    text = " ".join(notes)
    assert "1 rows without a better completion are left out." in text
    assert "Columns that were not used: judge." in text
    assert "8 rows have a margin, which the loss takes as nats" in text
    assert "Every chosen completion begins with white space and no other does" in text
    ignored = make_config(
        tmp_path / "a.jsonl", tmp_path / "out", columns=("margin=", "chosen=rejected", "rejected=chosen")
    )
    text = " ".join(set_up_training(ignored).notes)
    assert "margin" not in text.replace("not used: judge, margin", "") and "Every rejected completion" in text


def test_plain_prompts_and_the_options_of_the_template(tmp_path, small_model):
    data = write_rows(tmp_path / "a.jsonl", PAIRS)
    options = {"model": str(small_model), "max_length": 64, "eval_fraction": 0.0}
    setup = set_up_training(make_config(data, tmp_path / "out", **options))
    assert any(
        "n 8 examples the chat template makes a plain prompt the user's turn" in note for note in setup.notes
    )
    decode = setup.pretrained.tokenizer.decode
    assert decode(setup.stages[-1].splits.train[0].prompt, skip_special_tokens=False).startswith(
        "<|im_start|>user\n0+0?<|im_end|>"
    )
    plain = set_up_training(make_config(data, tmp_path / "out", as_chat="never", **options))
    assert decode(plain.stages[-1].splits.train[0].prompt, skip_special_tokens=False) == "<s>0+0?"
    (tmp_path / "t.jinja").write_text("{{ greeting }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    other = make_config(
        data,
        tmp_path / "out",
        chat_template=tmp_path / "t.jinja",
        chat_template_kwargs='{"greeting": "Hi"}',
        **options,
    )
    assert decode(set_up_training(other).stages[-1].splits.train[0].prompt) == "Hi[0+0?]"


def test_long_rows_and_the_kind_of_rows(tmp_path):
    long = {"prompt": "1" * 40, "chosen": "2", "rejected": "3"}
    data = write_rows(tmp_path / "a.jsonl", [long, *PAIRS])
    options = {"max_length": 32, "eval_fraction": 0.0}
    cut = set_up_training(make_config(data, tmp_path / "out", max_prompt_length=3, **options))
    prompts = [example.prompt for example in cut.stages[-1].splits.train]
    assert max(map(len, prompts)) == 3 and len(prompts) == 9
    fitting = make_config(data, tmp_path / "out", on_long="drop", kind="preference", **options)
    dropped = set_up_training(fitting)
    assert len(dropped.stages[-1].splits.train) == 8
    assert any("Left out of 9 examples: 1 longer than the maximum." in note for note in dropped.notes)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: a row should have at most 32 tokens"):
        set_up_training(make_config(data, tmp_path / "out", on_long="error", **options))
    skipped = make_config(data, tmp_path / "out", on_long="error", on_bad_row="skip", **options)
    assert len(set_up_training(skipped).stages[-1].splits.train) == 8
    imitated = make_config(data, tmp_path / "out", kind="prompt_completion", epochs=3, **options)
    (stage,) = set_up_training(imitated).stages
    assert stage.name == "sft" and {len(one.completions) for one in stage.splits.train} == {1}
    for name, value in (("kind", "pairs"), ("on_bad_row", "warn"), ("as_chat", "yes"), ("on_long", "split")):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} should be .*'{value}': choose"):
            make_config(data, tmp_path / "out", **{name: value})


def test_the_date_of_a_template_is_that_of_the_first_day(tmp_path, small_model, monkeypatch):
    class Later(date):
        @classmethod
        def today(cls):
            return cls(2031, 2, 3)

    data = write_rows(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%Y') }}" + tiny.CHATML)
    options = {"model": str(small_model), "max_length": 64, "chat_template": tmp_path / "t.jinja"}
    first = set_up_training(make_config(data, tmp_path / "out", **options))
    first.run.open()
    monkeypatch.setattr(run_record, "date", Later)
    resumed = set_up_training(make_config(data, tmp_path / "out", resume=True, **options))
    assert list(resumed.stages[-1].splits.train) == list(first.stages[-1].splits.train)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["today"] == date.today().isoformat()
    fresh = set_up_training(make_config(data, tmp_path / "new", **options))
    assert fresh.pretrained.tokenizer.decode(fresh.stages[-1].splits.train[0].prompt).startswith("2031")


def test_ids_and_positions_that_the_model_does_not_know(tmp_path, small_model):
    options = {"model": str(small_model), "as_chat": "never", "eval_fraction": 0.0}
    data = write_rows(
        tmp_path / "a.jsonl", [*PAIRS, {"prompt": "x" * 40, "chosen": "y" * 40, "rejected": "z"}]
    )
    with pytest.raises(
        ValueError, match=r"--max-length should be at most 65, .* end at 64, but a.jsonl, line 9 has 8"
    ):
        set_up_training(make_config(data, tmp_path / "out", **(options | {"max_length": 128})))
    set_up_training(make_config(data, tmp_path / "out", **(options | {"max_length": 65})))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(small_model))
    new_token = "Q" * 9
    tokenizer.add_tokens([new_token, *(f"<t{k}>" for k in range(60))])
    tokenizer.save_pretrained(str(tmp_path / "larger"))
    options |= {"tokenizer": str(tmp_path / "larger"), "max_length": 64}
    fine = write_rows(tmp_path / "b.jsonl", PAIRS)
    set_up_training(make_config(fine, tmp_path / "out", **options))  # no row has an id that is too large
    bad = write_rows(tmp_path / "c.jsonl", [*PAIRS, {"prompt": "<t59>", "chosen": "a", "rejected": "b"}])
    with pytest.raises(
        ValueError, match=r"c.jsonl, line 9: token ids should be below 400, .* but one is \d+: use the"
    ):
        set_up_training(make_config(bad, tmp_path / "out", **options))


def test_rows_marked_as_test_are_held_out_beside_eval_data(tmp_path):
    rows = [{**row, "split": "validation" if k < 2 else "train"} for k, row in enumerate(PAIRS)]
    data, other = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", PAIRS[4:6])
    setup = set_up_training(make_config(data, tmp_path / "out", eval_data=other))
    assert [len(setup.stages[-1].splits.train), len(setup.stages[-1].splits.eval)] == [6, 2]
    assert "2 rows of --data that are marked as test are left out." in setup.notes
    assert any(
        note.startswith("2 of the 2 eval examples have prompts that are trained on") for note in setup.notes
    )


def test_several_files_are_one_run(tmp_path):
    files = [write_rows(tmp_path / f"{k}.jsonl", PAIRS[k : k + 4]) for k in (0, 4)]
    config = make_config(tuple(map(Path, files)), tmp_path / "out", eval_fraction=0.0)
    assert len(set_up_training(config).stages[-1].splits.train) == 8
    RunFolder(config).open()
    with pytest.raises(ValueError, match=r"but that in .* had --data"):
        RunFolder(make_config(files[0], tmp_path / "out", eval_fraction=0.0)).check(resume=True)
