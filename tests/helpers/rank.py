"""Run a script and then print which of how many processes this one was, as `training` saw it.

The script has to have joined the processes itself: the count is a sum over the group that it left behind.
"""

import runpy
import sys

import torch
from accelerate import PartialState
from torch import distributed

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    count = torch.ones(())
    distributed.all_reduce(count)  # raises where no group was made
    state = PartialState()
    assert state.num_processes == count, (state.num_processes, count)
    print(f"rank {state.process_index} of {int(count)}", flush=True)
    distributed.destroy_process_group()
