"""Recipes: what they set, what the command line overrides, and what is refused."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from dpo_wrapper.training.command_line import parse_arguments, parse_recipe
from dpo_wrapper.training.config import GROUPS, TrainConfig
from dpo_wrapper.training.recipe import format_recipe, option_types


def write(folder, text):
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


RECIPE = """\
# values are written as on the command line
data: [a.jsonl, b.jsonl]
lr: 1e-5
precision: no
stage:
  - sft
  - dpo
wpo: true
loss: simpo(beta=2.0, gamma=0.5)
chat-template-kwargs:
  enable_thinking: false
eval_data: null
"""


def test_a_recipe_sets_options_as_the_command_line_does(tmp_path):
    config, _ = parse_arguments([str(write(tmp_path, RECIPE))])
    expected = TrainConfig(
        data=(Path("a.jsonl"), Path("b.jsonl")),
        learning_rate=1e-5,
        precision="no",
        stage=("sft", "dpo"),
        wpo=True,
        loss="simpo(beta=2.0, gamma=0.5)",
        chat_template_kwargs='{"enable_thinking": false}',
    )
    assert config == expected


def test_the_command_line_overrides_a_recipe(tmp_path):
    recipe = str(write(tmp_path, RECIPE))
    config, plans = parse_arguments(
        [recipe, "--plan", "--learning-rate", "3e-4", "--data", "c.jsonl", "--no-wpo"]
    )
    assert (config.learning_rate, config.data, config.wpo) == (3e-4, (Path("c.jsonl"),), False)
    assert config.stage == ("sft", "dpo") and plans


def test_data_may_be_named_on_the_command_line_alone(tmp_path):
    recipe = str(write(tmp_path, "epochs: 2\n"))
    assert parse_arguments([recipe, "--data", "c.jsonl"])[0] == TrainConfig(data=(Path("c.jsonl"),), epochs=2)
    with pytest.raises(ValueError, match="but there is no --data: see dpo-wrapper train --help"):
        parse_arguments([recipe])


OTHER_VALUES = {
    "bool": True,
    "int": 9,
    "float": 0.25,
    "str": "some words: of it",
    "Path": Path("a/b"),
    "tuple": (Path("a"), Path("b c")),
}
SPECIAL_VALUES = {
    "columns": ("prompt=question", "margin="),
    "stage": ("pretrain", "dpo"),
    "chat_template_kwargs": '{"a": 1}',
    "train_on_prompt": False,
}


def choose_value(field, hint):
    """A value that is not the default, of a field of the settings."""
    if field.name in SPECIAL_VALUES:
        return SPECIAL_VALUES[field.name]
    text = str(hint)
    if "Literal" in text:
        options = [value for value in flatten_literals(hint) if value != field.default]
        return (options[0],) if "tuple" in text else options[0]
    kind = next(kind for kind in ("tuple", "bool", "int", "float", "Path", "str") if kind in text)
    if kind == "tuple" and "Path" not in text:
        return ("a", "b c")
    return OTHER_VALUES[kind]


def flatten_literals(hint):
    parts = getattr(hint, "__args__", ())
    return [value for part in parts for value in (flatten_literals(part) or [part]) if isinstance(value, str)]


FIELDS = {field.name: field for group in GROUPS.values() for field in fields(group)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_survives_a_recipe(name, tmp_path, monkeypatch):
    for group in (*GROUPS.values(), TrainConfig):  # some options make sense beside others only
        monkeypatch.setattr(group, "__post_init__", lambda self: None, raising=False)
    value = choose_value(FIELDS[name], option_types()[name])
    assert value != FIELDS[name].default
    config = TrainConfig(**({"data": (Path("x"),)} | {name: value}))
    arguments = parse_recipe(write(tmp_path, format_recipe(config)))
    assert TrainConfig.from_groups(arguments) == config


def test_the_printed_configuration_is_a_recipe_of_the_same_run(tmp_path, capsys):
    args = ["--data", "x.jsonl", "--lr", "1e-7", "--stage", "sft", "dpo", "--columns", "prompt=q", "margin="]
    with pytest.raises(SystemExit) as exit_:
        parse_arguments([*args, "--print-config"])
    assert exit_.value.code == 0
    recipe = write(tmp_path, capsys.readouterr().out)
    assert parse_arguments([str(recipe)]) == parse_arguments(args)


REFUSED = {
    "unknown key": ("epochz: 3", r"line 1: a key .* but it is epochz: did you mean epochs\?"),
    "unknown key, none near": ("\nqwertyuiop: 3", r"line 2: .* qwertyuiop: see dpo-wrapper train --help"),
    "twice": ("lr: 1\nlearning-rate: 2", r"line 2: .* names learning-rate again: leave one out"),
    "no mapping": ("- epochs", "should have lines like 'learning-rate: 1e-5'"),
    "no YAML": ("a: [", r"recipe should be a YAML file, but .*recipe\.yaml cannot be read"),
    "no boolean": ("wpo: maybe", "line 1: wpo should be true or false, but it is maybe"),
    "nested list": ("stage: [[sft]]", "line 1: stage should be a list of single values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_in_a_recipe_gets_one_sentence(case, tmp_path):
    text, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        parse_arguments([str(write(tmp_path, text)), "--data", "x"])


def test_a_value_that_cannot_be_names_the_recipe(tmp_path):
    recipe = write(tmp_path, "epochs: many")
    with pytest.raises(
        ValueError, match=r"recipe\.yaml: --epochs should be an integer, but it is many: give"
    ):
        parse_arguments([str(recipe), "--data", "x"])


def test_an_argument_that_is_no_recipe_is_explained():
    with pytest.raises(ValueError, match=r"name a \.yaml file, or write --data rows\.jsonl"):
        parse_arguments(["rows.jsonl"])


def test_every_field_has_a_default_but_data():
    required = [name for name, f in FIELDS.items() if f.default is MISSING and f.default_factory is MISSING]
    assert required == ["data"]
