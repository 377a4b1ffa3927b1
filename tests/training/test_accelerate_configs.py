"""The configurations in examples/accelerate: each starts one run of two processes."""

import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dpo_wrapper.training.train import train
from helpers.forked_scripts import ROOT, ForkedCommand
from helpers.runs import make_config

FOLDER = ROOT / "examples" / "accelerate"
NAMES = ("ddp", "fsdp2")
OPTIONS = {"sft_epochs": 0, "epochs": 1, "max_steps": 2, "samples": 0, "exact_answers": 0, "save_steps": 0}

SCRIPT = """
import sys
from pathlib import Path
import torch
from dpo_wrapper.dpo import DPO
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Trainer
from helpers.runs import SMALL_DECODER, make_config

torch.set_num_threads(1)
PRESETS["tiny"] = SMALL_DECODER
rows, out = map(Path, sys.argv[1:3])
probe_model = Trainer.probe_model

def note_sharding(self):
    is_sharded = hasattr(next(self.module.parameters()), "full_tensor")
    assert is_sharded == (sys.argv[3] == "fsdp2")
    probe_model(self)

Trainer.probe_model = note_sharding
train(make_config(rows, out, cpu=False, **OPTIONS))
assert torch.distributed.get_world_size() == 2
"""


def test_the_configurations_are_those_that_the_page_names():
    files = {file.stem: file.read_text() for file in FOLDER.iterdir()}
    assert files.keys() == set(NAMES)
    for name, text in files.items():
        comment = [line for line in text.splitlines() if line.startswith("#")]
        assert len(comment) == 2 and f"--config_file examples/accelerate/{name}.yaml" in comment[1]
        assert yaml.safe_load(text)["num_processes"] == 2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would take two GPUs")
@pytest.mark.skipif(sys.platform == "win32", reason="the processes are forked")
@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_runs_in_two_processes(name, rows, tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "two"
    script.write_text(SCRIPT.replace("OPTIONS", repr(OPTIONS)))
    command = ["accelerate", "launch", "--config_file", FOLDER / f"{name}.yaml", script, rows, out, name]
    launched = ForkedCommand(tmp_path / "printed", tmp_path, *command)
    assert launched.status == 0, launched.errors[-3000:]
    train(make_config(rows, tmp_path / "one", **OPTIONS))
    weights, expected = (load_file(tmp_path / end / "model.safetensors") for end in ("two", "one"))
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)
