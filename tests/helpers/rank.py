"""`rank.py FOLDER SCRIPT ARGUMENTS`: run a script, then leave a file named "rank n of m".

The script has to have joined the processes itself: the count is a sum over the group that it left behind.
A file, for what several processes print may run into one line.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import distributed

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path.remove(str(Path(__file__).parent))  # where `tokenizers` is another
    runpy.run_path(sys.argv[0], run_name="__main__")
    count = torch.ones(())
    distributed.all_reduce(count)  # raises where no group was made
    state = PartialState()
    assert state.num_processes == count, (state.num_processes, count)
    (folder / f"rank {state.process_index} of {int(count)}").touch()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort a process that ends by itself (torch 2.13)
