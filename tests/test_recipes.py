"""The recipes in examples/recipes/ run, each with what its comment says."""

import re

import pytest

from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.command_line import parse_arguments
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.train import train
from helpers.lora_runs import save_llama
from helpers.runs import BUNDLED, ROOT, SMALL_DECODER, read_metrics, run_in_two_processes

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
NAMES = {"first_steps", "lora", "simpo", "kto", "two_processes"}


@pytest.fixture
def rows(tmp_path):
    """A folder with a few rows of each of the bundled files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in BUNDLED.parent.glob("*.jsonl"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / file.name).write_text("".join(lines[:40]), encoding="utf-8")
    return folder


def read_recipe(name, *args):
    return parse_arguments([str(ROOT / "examples" / "recipes" / f"{name}.yaml"), *map(str, args)])[0]


def test_there_are_five_and_each_names_its_command():
    assert {path.stem for path in RECIPES} == NAMES
    for path in RECIPES:
        text = path.read_text(encoding="utf-8")
        assert re.search(rf"^#     (dpo-wrapper|torchrun .*) train examples/recipes/{path.name}", text, re.M)
        assert isinstance(read_recipe(path.stem), TrainConfig)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_data_of_a_recipe_is_there(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert all(file.exists() for file in read_recipe(path.stem).data)


def test_first_steps_says_what_the_command_does_by_default():
    """The recipe spells out what README's first command leaves to defaults."""
    recipe = read_recipe("first_steps")
    by_default = TrainConfig(data=recipe.data)
    for name in ("model", "epochs", "loss", "batch_size", "exact_answers"):
        assert getattr(recipe, name) == getattr(by_default, name), name
    assert recipe.learning_rate == by_default.peak_learning_rate("dpo", 100)
    assert recipe.sft_learning_rate == by_default.peak_learning_rate("sft", 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_steps", "simpo", "kto"])
def test_a_recipe_of_a_new_model_runs(name, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    limits = ("--max-steps", 3, "--sft-epochs", 1, "--epochs", 1, "--cpu", "--save-steps", 0)
    config = read_recipe(name, "--data", rows, "--out", tmp_path / "run", *limits)
    train(config)
    stages = {record["stage"] for record in read_metrics(tmp_path / "run")}
    assert stages == {"sft", "dpo"}
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_recipe_of_an_adapter_runs(rows, tmp_path):
    model = save_llama(tmp_path / "model")
    limits = ("--max-steps", 2, "--epochs", 1, "--cpu")
    data = ("--data", rows / "preferences.jsonl", "--max-length", 128)
    train(read_recipe("lora", *data, "--model", model, "--out", tmp_path / "run", *limits))
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_recipe_of_two_processes_runs_in_two(rows, tmp_path):
    script = tmp_path / "script.py"
    limits = ["--max-steps", "2", "--sft-epochs", "1", "--epochs", "1", "--exact-answers", "0"]
    recipe = str(ROOT / "examples" / "recipes" / "two_processes.yaml")
    args = ["train", recipe, "--data", str(rows), "--out", str(tmp_path / "run"), *limits]
    script.write_text(
        "import torch\n"
        "from dpo_wrapper.cli import main\n"
        "from dpo_wrapper.pretrained import PRESETS\n"
        "from helpers.curves import unrendered_curves\n"
        "from helpers.runs import SMALL_DECODER\n"
        "torch.set_num_threads(1)\n"
        "PRESETS['tiny'] = SMALL_DECODER\n"
        "with unrendered_curves():\n"
        f"    main({args!r})\n"
    )
    run_in_two_processes(script)
    assert (tmp_path / "run" / "model.safetensors").exists()
