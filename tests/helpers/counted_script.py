"""`python -m helpers.counted_script FOLDER SCRIPT ARGUMENTS`: a script in one of several processes.

Each leaves a file, named "rank n of m"; the script has to have joined the processes itself, for the count is
a sum over the group that it left behind. (A file, for what several processes print may run into one line.)
"""

import runpy
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import distributed


def run_counted(folder: Path, script: list[str]) -> None:
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")
    count = torch.ones((), device=PartialState().device)
    distributed.all_reduce(count)  # raises where no group was made
    state = PartialState()
    assert state.num_processes == count, (state.num_processes, count)
    (folder / f"rank {state.process_index} of {int(count)}").touch()
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_counted(Path(sys.argv[1]), sys.argv[2:])
