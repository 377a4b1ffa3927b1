"""Every block of the README runs, and what it says of files and defaults is so."""

import re
from pathlib import Path

import pytest
import torch
from dpo_wrapper.losses.describe import ours, table

from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_shell_blocks_are_the_two_commands():
    assert len(SHELL) >= 2
    assert (
        "pip install" in SHELL[0] and "dpo-wrapper train --data examples/data/preferences.jsonl" in SHELL[0]
    )
    assert "pip install" in SHELL[1] and "pytest" in SHELL[1]


@pytest.mark.parametrize("block", [block for block in PYTHON if "runs/first" not in block])
def test_python_blocks_run(block):
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["loss"].isfinite()


def test_the_block_that_loads_a_run_runs(tmp_path, monkeypatch):
    from dpo_wrapper.training.train import train

    (block,) = (block for block in PYTHON if "runs/first" in block)
    monkeypatch.setitem(PRESETS, "tiny", {"dim": 32, "depth": 1, "heads": 1})
    data = ROOT / "examples" / "data" / "preferences.jsonl"
    monkeypatch.chdir(tmp_path)
    train(TrainConfig(data=data, out=Path("runs/first"), sft_epochs=0, epochs=1, cpu=True, max_length=128))
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["model"](torch.arange(5)[None]).shape == (1, 5, 263)


def test_the_table_of_losses_is_what_the_classes_say():
    assert f"\n\n{table()}\n\n" in README, "paste what dpo_wrapper.losses.describe.table() gives"


def test_files_that_are_named_exist():
    for name in re.findall(r"(?:dpo_wrapper|examples|tests)/[\w/]+\.(?:py|jsonl)", README):
        assert (ROOT / name).exists(), name


def test_options_that_are_named_exist():
    known = {f"--{name.replace('_', '-')}" for name in TrainConfig.__dataclass_fields__}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= known


def test_losses_that_take_margins_are_named():
    named = README.split("of Sigmoid, SigmoidNorm, ")[1].split(". Where they")[0]
    found = {"Sigmoid", "SigmoidNorm", *re.findall(r"\w+", named)} - {"and"}
    assert found == {kind.__name__ for kind in ours() if kind.takes_margin}
