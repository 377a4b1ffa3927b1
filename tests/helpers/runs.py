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


def run_in_two_processes(script, *arguments):
    """A script in two processes, of which each has to say, at the end, that it was one of two.

    `torch.distributed.run` starts them: `accelerate launch --cpu --num_processes 2` starts one (1.15).
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        list(map(str, [sys.executable, *launch, ROOT / "tests/helpers/rank.py", script, *arguments])),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert sorted(ranks) == ["rank 0 of 2", "rank 1 of 2"], done.stdout


def train_in_two_processes(script, rows, out, loss=None):
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
    run_in_two_processes(script, rows, out)


class Interrupted(Exception):
    pass
