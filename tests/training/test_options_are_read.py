"""Every option is read by code that acts on it: each read is recorded in runs that have all branches."""

import linecache
import re
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

import dpo_wrapper
from dpo_wrapper import cli
from dpo_wrapper.commands.chat.config import ChatConfig
from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.pairs.config import PairsConfig
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training import setup
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.train import train
from helpers.datasets import write_rows
from helpers.lora_runs import save_llama
from helpers.option_effects import BASE, FILES
from helpers.runs import SMALL_DECODER

PACKAGE = Path(dpo_wrapper.__file__).parent
DEFINITIONS = (
    "training/options/",
    "training/config.py",
    "data/config.py",
    "data/prepare/config.py",
    "commands/loading_options.py",
    "commands/evaluate/config.py",
    "commands/pairs/config.py",
    "commands/chat/config.py",
    "commands/export/config.py",
)
"""Where options are defined and checked one by one: what reads them through a property there counts."""

WORDS_ALONE = (
    ("training/model_card.py", None),
    ("training/reference_words.py", None),
    ("training/train.py", "describe_plan"),
    ("training/setup.py", "check_options"),
)
"""Files, and functions in files, that say or refuse what an option has been set to, and do nothing else."""


def record_reads(options_class: Any):
    """A subclass that records the options that are read, and the dictionary with the places that read each.

    Reads by a name that is computed (`getattr`), as in checks of all options of a kind, do not count.
    """
    readers = defaultdict(set)

    class Recorded(options_class):
        def __getattribute__(self, name):
            if name in options_class.__dataclass_fields__:
                place = find_reader(name)
                if place is not None:
                    readers[name].add(place)
            return super().__getattribute__(name)

    return Recorded, readers


def find_reader(name):
    """The place in the package, outside of definitions, on whose behalf an option is read."""
    frame = sys._getframe(2)
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    if re.search(rf"\.{name}\b", line) is None:
        return None
    while frame is not None:
        file, function = Path(frame.f_code.co_filename), frame.f_code.co_name
        if function == "__getattribute__":  # the recorder's, in front of a property
            frame = frame.f_back
            continue
        if not file.is_relative_to(PACKAGE):
            return None
        place = file.relative_to(PACKAGE).as_posix()
        if not place.startswith(DEFINITIONS):
            is_words = (place, None) in WORDS_ALONE or (place, function) in WORDS_ALONE
            return None if is_words else (place, function)
        frame = frame.f_back
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    write_rows(folder / "pairs.jsonl", FILES["pairs.jsonl"])
    save_llama(folder / "llama")
    return folder


@pytest.mark.slow
def test_every_option_of_training_is_read(folder, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    monkeypatch.setattr(setup, "check_trackers", lambda names: None)  # no tracker is needed
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *_: None)
    recorded, readers = record_reads(TrainConfig)
    runs = [
        {"stage": ("pretrain", "sft", "dpo"), "sft_epochs": 1, "ref_model_sync_steps": 1},
        {
            "model": str(folder / "llama"),
            "lora": True,
            "precompute_ref_log_probs": True,
            "report_to": ("wandb",),
        },
    ]
    for k, options in enumerate(runs):
        data = {"data": folder / "pairs.jsonl", "out": folder / f"run-{k}", "max_steps": 1}
        train(recorded(**(BASE | data | options)))
    assert [name for name in TrainConfig.__dataclass_fields__ if name not in readers] == []


FEW = {"max_new_tokens": 1, "cpu": True}

COMMANDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prepare": (PrepareConfig, {"data": "pairs.jsonl", "out": "data", "workers": 1, "strict": True}),
    "evaluate": (
        EvaluateConfig,
        FEW
        | {"data": "pairs.jsonl", "out": "evaluation", "model": "llama", "reference": "none"}
        | {"judge": "judge.py:judge", "num_samples": 1, "resamples": 100},
    ),
    "pairs": (
        PairsConfig,
        FEW
        | {"data": "pairs.jsonl", "out": "made.jsonl", "model": "llama"}
        | {"judge": "judge.py:judge", "num_samples": 2, "temperature": 2.0},
    ),
    "chat": (ChatConfig, FEW | {"model": "llama", "prompt": "a", "temperature": 1.0, "reference": True}
        | {"reference_model": "llama"}),
    "export": (ExportConfig, {"model": "llama", "to": ("merged",), "out": "exports"}),
}  # fmt: skip


OF_GGUF = ("quantize", "adapter", "base")
"""Options of one form of export, which its own tests read."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_read(folder, monkeypatch, command):
    config_class, options = COMMANDS[command]
    recorded, readers = record_reads(config_class)
    monkeypatch.chdir(folder)
    Path("judge.py").write_text("def judge(prompt, completion): return len(completion)\n")
    options = options | {name: Path(options[name]) for name in ("data", "out") if name in options}
    monkeypatch.setattr(cli, "parse_options", lambda *_: recorded(**options))
    with suppress(SystemExit):  # the status of --strict
        cli.main([command])
    names = [field.name for field in fields(config_class) if field.init and field.name not in OF_GGUF]
    assert [name for name in names if name not in readers] == []


def test_an_option_that_is_only_checked_is_not_read(folder):
    recorded, readers = record_reads(TrainConfig)
    config = recorded(**(BASE | {"data": folder / "pairs.jsonl"}))
    assert not readers and getattr(config, "epochs") == config.epochs  # noqa: B009
    assert not readers
