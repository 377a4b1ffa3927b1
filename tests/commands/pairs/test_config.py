"""Options that contradict each other are refused in one sentence, and the command line has all of them."""

import re

import pytest

from dpo_wrapper import cli
from dpo_wrapper.commands.pairs.config import PairsConfig


def make_config(**options):
    return PairsConfig(**{"data": ("logs.jsonl",), "out": "pairs.jsonl", "model": "m"} | options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"out": "pairs"}, r"--out should be a \.jsonl file, but it is pairs: name it pairs\.jsonl\."),
        ({"data": ()}, "should be given files of logs, but there are none"),
        ({"num_samples": 2}, "--num-samples should be 1 without --judge, but it is 2"),
        ({"num_samples": 1, "judge": "a:b"}, "--num-samples should be at least 2 with --judge, but it is 1"),
        ({"num_samples": 0}, "--num-samples should be"),
        ({"num_samples": 0, "judge": "a:b"}, "--num-samples should be at least 2"),
        ({"keep": "list"}, "--keep list should be given together with --judge"),
        ({"judge": "a:b", "temperature": 0.0}, "--temperature should be above 0 where several answers"),
        ({"temperature": -1.0}, r"--temperature should be a number above 0, but it is -1\.0"),
        ({"top_p": 1.5}, r"--top-p should be above 0 and at most 1, but it is 1\.5"),
        ({"temperature": 0.0, "top_k": 5}, "--top-k should be left out where --temperature is 0"),
        ({"batch_size": 0}, "--batch-size should be at least 1, but it is 0"),
        ({"max_new_tokens": 512}, "--max-new-tokens should leave room for a prompt in --max-length 512"),
    ],
)
def test_options_that_cannot_be_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        make_config(**options)


def test_defaults_follow_from_other_options():
    assert make_config().samples_per_prompt == 1 and make_config(judge="a:b").samples_per_prompt == 4
    assert make_config(temperature=0.0).sampling is None and make_config().sampling.temperature == 1.0
    assert make_config().answer_length == make_config(max_length=4096).answer_length == 256
    assert make_config(max_length=100).answer_length == make_config(max_length=100).find_prompt_length() == 50
    assert make_config(max_length=100, max_new_tokens=30).find_prompt_length() == 70
    assert make_config(max_prompt_length=50).find_prompt_length() == 50
    assert make_config(max_new_tokens=30).find_prompt_length(max_positions=64) == 34
    with pytest.raises(ValueError, match=r"should leave room .* in the 64 positions of m, but"):
        make_config().find_prompt_length(max_positions=64)


def test_the_command_says_one_sentence_for_bad_input(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for args, problem in (
        (["logs.jsonl", "--out", "p.jsonl", "--model", "none"], "the model should be"),
        (["none.jsonl", "--out", "p.jsonl", "--model", "none"], "the path should be a file"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["pairs", *args])
        printed = capsys.readouterr().err
        assert exit_.value.code == 2 and problem in printed and printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["logs.jsonl"]  # nothing was begun


def test_help_lists_every_option_with_its_text(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pairs", "--help"])
    printed = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out))
    assert "LOGS" in printed
    for name, option in PairsConfig.__dataclass_fields__.items():
        if option.init and name != "data":
            assert re.search(rf"--{name.replace('_', '-')} .{{0,60}}[A-Za-z0-9].{{15,}}", printed), name
