"""What a comparison is made of, and what is refused."""

import pytest

from dpo_wrapper.commands.compare.config import parse_arguments
from dpo_wrapper.commands.compare.runs import list_runs

RECIPE = "data: [rows.jsonl]\nmodel: tiny\nloss: {loss}\nlearning-rate: {rate}\n"


@pytest.fixture
def recipes(tmp_path):
    files = [tmp_path / f"{name}.yaml" for name in ("slow", "fast")]
    for file, rate in zip(files, ("1e-5", "1e-4"), strict=True):
        file.write_text(RECIPE.format(loss="ipo(beta=0.2)", rate=rate))
    return [str(file) for file in files]


def test_losses_become_runs_with_all_seeds(tmp_path):
    arguments = ["--losses", "sigmoid", "simpo(beta=2.0)", "--seeds", "2", "--seed", "5", "--data", "a.jsonl"]
    comparison = parse_arguments([*arguments, "--out", str(tmp_path), "--epochs", "1"])
    runs = list_runs(comparison)
    names = ["sigmoid-seed5", "simpo-beta-2.0-seed5", "sigmoid-seed6", "simpo-beta-2.0-seed6"]
    assert [run.name for run in runs] == names
    assert [run.config.loss for run in runs[:2]] == ["sigmoid", "simpo(beta=2.0)"]
    assert {run.config.split_seed for run in runs} == {5} and [run.config.seed for run in runs[1:3]] == [5, 6]
    assert {run.config.epochs for run in runs} == {1}
    assert runs[3].config.out == tmp_path / "runs" / names[3]


def test_recipes_are_contestants_and_the_command_line_wins(recipes):
    comparison = parse_arguments([*recipes, "--batch-size", "4"])
    assert [one.name for one in comparison.contestants] == ["slow", "fast"]
    assert [one.config.learning_rate for one in comparison.contestants] == [1e-5, 1e-4]
    assert {one.config.loss for one in comparison.contestants} == {"ipo(beta=0.2)"}
    assert {one.config.batch_size for one in comparison.contestants} == {4}
    with_losses = parse_arguments([*recipes, "--losses", "kto", "orpo"])
    assert [one.name for one in with_losses.contestants] == ["slow-kto", "slow-orpo", "fast-kto", "fast-orpo"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--losses", "sigmoid"], "at least two losses or recipes to compare, but there is sigmoid alone"),
        ([], "at least two losses or recipes"),
        (["--losses", "sigmoid", "Sigmoid"], "sigmoid and Sigmoid are one: leave one out"),
        (
            ["--losses", "sigmoid", "ipo", "--loss", "kto"],
            "--losses should be given without --loss, but that is",
        ),
        (["--losses", "sigmoid", "ipo", "--seeds", "0"], "--seeds should be at least 1, but it is 0"),
        (["--losses", "sigmoid", "ipo", "--resume"], "--resume should be left out of a comparison"),
        (
            ["--losses", "sigmoid", "ipo", "--num-samples", "3"],
            "--num-samples is of answers that a judge reads",
        ),
        (["--losses", "sigmoid", "sigmoit"], "sigmoit"),
        (["--losses", "sigmoid", "ipo", "dpo"], "sigmoid and dpo are one: leave one out"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        parse_arguments([*arguments, "--data", "a.jsonl"])


def test_recipes_on_different_data_are_refused(recipes):
    with open(recipes[1], "a") as file:
        file.write("max-length: 77\n")
    with pytest.raises(
        ValueError, match="--max-length should be the same for all that is compared, but it is 512 and 77"
    ):
        parse_arguments(recipes)
    assert len(parse_arguments([*recipes, "--max-length", "64"]).contestants) == 2
