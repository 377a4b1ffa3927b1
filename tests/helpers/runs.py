import json
import os
import subprocess
import sys
from pathlib import Path

from dpo_wrapper.training.config import TrainConfig

ROOT = Path(__file__).parents[2]


BUNDLED = ROOT / "examples" / "data" / "preferences.jsonl"


def config(rows, out, **kwargs):
    options = {
        "sft_epochs": 1,
        "epochs": 2,
        "batch_size": 4,
        "max_length": 128,
        "cpu": True,
    }
    return TrainConfig(data=rows, out=out, **(options | kwargs))


def records(folder, *drop):
    """The log without times."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith("/second") and k not in drop}
        for line in lines
    ]


def run_twice(script, *arguments):
    """A script in two processes of one accelerate launch."""
    launch = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--main_process_port", str(20_000 + os.getpid() % 20_000), "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, script, *arguments]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def train_twice(script, rows, out, loss=None):
    """A run of two processes with the settings of `config`."""
    more = "" if loss is None else f", loss={loss!r}"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from dpo_wrapper.training.config import PRESETS, TrainConfig\n"
        "from dpo_wrapper.training.train import train\n"
        "torch.set_num_threads(1)\n"
        "PRESETS['tiny'] = {'dim': 32, 'depth': 1, 'heads': 1}\n"
        "train(TrainConfig(data=Path(sys.argv[1]), out=Path(sys.argv[2]), sft_epochs=1, epochs=2,\n"
        f"      batch_size=4, max_length=128, cpu=True, save_every=0{more}))\n"
    )
    run_twice(script, rows, out)


class Interrupted(Exception):
    pass
