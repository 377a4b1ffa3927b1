"""What is wrong with a command line, in one sentence."""

import re

import pytest

from dpo_wrapper import cli
from dpo_wrapper.libraries.tyro_cli import explain_box

OPTIONS_OF = "the options should be those of dpo-wrapper"

SENTENCES = {
    "train --learning-rat 3 --data x": (
        f"{OPTIONS_OF} train, but there is --learning-rat: did you mean --learning-rate or "
        "--pretrain-learning-rate or --sft-learning-rate? See dpo-wrapper train --help."
    ),
    "train --lr-schedulr 3 --data x --bacth-size 3": (
        f"{OPTIONS_OF} train, but there is --lr-schedulr, --bacth-size: did you mean --lr-scheduler or "
        "--lr-scheduler-args or --batch-size? See dpo-wrapper train --help."
    ),
    "train --out x": f"{OPTIONS_OF} train, but there is no --data: see dpo-wrapper train --help.",
    "train --dat x": f"{OPTIONS_OF} train, but there is --dat and there is no --data: see dpo-wrapper",
    "evaluate": f"{OPTIONS_OF} evaluate, but there is no MODEL and no --data: see dpo-wrapper evaluate",
    "chat a b": f"{OPTIONS_OF} chat, but there is b: see dpo-wrapper chat --help.",
    "train --data x --lr abc": "--learning-rate should be a number, but it is abc: give another value.",
    "compare --losses a b --data x --seeds 1.5": "--seeds should be an integer, but it is 1.5: give another",
    "train --data x --precision fp8": (
        "--precision should be one of no, bf16, fp16, but it is fp8: choose one of them."
    ),
    "train --data x --seed -1": "--seed should be from 0 to 4,294,967,295, but it is -1: give another value.",
    "train --data --out x": "--data should name at least one file, but it names none: write --data FILE,",
    "evaluate --data x": "--data should name at least one file, but it names none: write --data FILE,",
    "evaluate --model x --data y": "model should stand in front of all options, without a name, but",
    "evaluate x --data y --seed -1": "--seed should be at least 0, but it is -1: raise it.",
    "pairs a.jsonl --out": "--out should have a value, but it has none: give one, or leave it out.",
    "train --data x --lora-targets": "--lora-targets should be one name or more, but it is (): give another",
}


def test_none_is_no_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--data", "x", "--stage", "foo"])
    choices = capsys.readouterr().err.partition("one of ")[2].partition(", but")[0]
    assert set(choices.split(", ")) == {"pretrain", "sft", "dpo"}


@pytest.mark.parametrize("line", SENTENCES)
def test_what_is_wrong_gets_one_sentence(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(line.split())
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and not printed.out and printed.err.count("\n") == 1
    problem, _, similar = printed.err.partition("did you mean ")
    expected, _, expected_similar = f"dpo-wrapper: {SENTENCES[line]}".partition("did you mean ")
    assert problem.startswith(expected)
    assert set(re.findall(r"--\S+\b", similar)) == set(re.findall(r"--\S+\b", expected_similar))


def test_a_box_of_another_kind_is_put_into_a_line() -> None:
    plain = " Oh\n ----------\n  These two\n  collide.\n  ---------\n  For full helptext, run p --help\n"
    assert explain_box(plain, "p") == "These two collide: see p --help."
    drawn = "\x1b[31m╭─ Oh ───────╮\x1b[0m\n\x1b[31m│\x1b[0m Here: this. \x1b[31m│\x1b[0m\n╰────────────╯\n"
    assert explain_box(drawn, "p") == "Here: this."
