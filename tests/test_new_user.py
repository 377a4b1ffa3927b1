"""What a new user types and sees, where no other test of the command or of the data looks at it.

Elsewhere: interruptions in training/test_stopping.py, names of models in pretrained/test_load.py, adapters in
training/test_lora.py, empty completions in data/tokens/test_encode.py, help and status in test_cli.py.
"""

import json
import re

import pytest

from dpo_wrapper import PreferenceDataset, cli
from dpo_wrapper.losses import Sigmoid, parse_losses
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.command_line import parse_arguments
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import train
from helpers import tokenizers as tiny
from helpers.datasets import write_rows
from helpers.runs import SMALL_DECODER, make_config, read_metrics

PAIRS = [{"prompt": f"{k}+{k}?", "chosen": str(2 * k), "rejected": f"{k} or so"} for k in range(8)]


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    return write_rows(tmp_path / "pairs.jsonl", PAIRS)


def test_a_dataset_from_a_file_has_the_tokens_that_the_command_trains_on(pairs, tmp_path):
    tokenizer = str(tiny.save_tokenizer(tmp_path / "chat", eos="<|im_end|>", template=tiny.CHATML))
    long = [{"prompt": "1" * 900, "chosen": "2", "rejected": "3"}]
    write_rows(pairs, [*PAIRS, *long])
    arguments = ["--data", pairs, "--tokenizer", tokenizer, "--eval-fraction", 0, "--out", tmp_path / "out"]
    config, _ = parse_arguments([str(argument) for argument in arguments])
    (*_, stage) = set_up_training(config).stages
    dataset = PreferenceDataset.from_file(pairs, tokenizer)
    assert len(dataset) == len(stage.splits.train) == 9
    for ours, trained in zip(dataset.examples, stage.splits.train, strict=True):
        assert (ours.prompt, ours.completions) == (trained.prompt, trained.completions)
    decode = set_up_training(config).pretrained.tokenizer.decode
    first = dataset.examples[0]
    text = decode([*first.prompt, *first.completions[0]], skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\n0+0?<|im_end|>") and text.endswith("assistant\n0<|im_end|>")


def test_words_that_others_use_are_understood(pairs):
    arguments = ["--data", str(pairs), "--lr", "1e-5", "--loss", "dpo", "--save-every", "7"]
    config, _ = parse_arguments(arguments)
    assert config == TrainConfig(data=pairs, learning_rate=1e-5, loss="dpo", save_steps=7)
    ((loss, weight),) = parse_losses(config.loss)
    assert isinstance(loss, Sigmoid) and weight == 1


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"question": "q", "good": "a", "bad": "b"}, r"has 'question', 'good', 'bad': name its .* --columns"),
        (
            {"prompt": "q", "good": "a", "rejected": "b"},
            r"'chosen': .*: add it, name its column",
        ),
        ({"ask": "q", "chosen": "a", "rejected": "b"}, r"'prompt', name its column by --columns"),
    ],
)
def test_other_columns_are_told_with_the_option_that_names_them(tmp_path, capsys, rows, sentence):
    file = write_rows(tmp_path / "a.jsonl", [rows])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--data", str(file), "--out", str(tmp_path / "out")])
    assert re.search(sentence, capsys.readouterr().err)


def test_a_folder_without_a_model_is_told_with_a_remedy(pairs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--data", str(pairs), "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.endswith("holds no config.json: give the folder that does.\n")


@pytest.mark.slow
def test_the_table_of_simpo_says_what_its_loss_says(pairs, tmp_path, capsys):
    """The loss is convex: below that of a margin of 0, the mean margin is positive."""
    options = {"loss": "simpo(beta=2.0, gamma=0.5)", "sft_epochs": 0, "samples": 0, "save_steps": 0}
    train(make_config(pairs, tmp_path / "out", **options))
    for record in read_metrics(tmp_path / "out"):
        is_ahead = record["loss"] < 0.9741  # log(1 + e^0.5), the loss of a margin of 0
        assert record["rewards/margins"] > 0 or not is_ahead, record
        assert abs(record["rewards/margins"]) < 20, record  # per token, where sums are in the hundreds
    assert "reward margin" in capsys.readouterr().out


@pytest.mark.slow
def test_the_size_of_checkpoints_is_said_in_the_help_and_by_a_run(pairs, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    printed = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "With AdamW a checkpoint has three times the size of the weights that train" in printed
    train(make_config(pairs, tmp_path / "out", sft_epochs=0, epochs=1, samples=0, save_steps=1))
    assert re.search(r"^checkpoint: \d.* MB every 1 steps in ", capsys.readouterr().out, re.MULTILINE)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"
