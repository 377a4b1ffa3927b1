"""`python -m helpers.forked_processes NUMBER FOLDER SCRIPT ARGUMENTS`: a script in so many processes.

Each leaves a file, named "rank n of m"; the script has to have joined the processes itself, for the count is
a sum over the group that it left behind. (A file, for what several processes print may run into one line.)

They are forked from one process that has imported the libraries, which takes longer than most scripts run,
and find each other as those of `torch.distributed.run` do: in a store that the first process holds.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from accelerate import PartialState
from torch import distributed, multiprocessing

import dpo_wrapper  # noqa: F401


def run_rank(rank: int, size: int, port: int, folder: Path, script: list[str]) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sizes = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= address | sizes | {"LOCAL_WORLD_SIZE": str(size)}
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")
    count = torch.ones(())
    distributed.all_reduce(count)  # raises where no group was made
    state = PartialState()
    assert state.num_processes == count, (state.num_processes, count)
    (folder / f"rank {state.process_index} of {int(count)}").touch()
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may abort a process that ends by itself (torch 2.13)


if __name__ == "__main__":
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    size = int(sys.argv[1])
    arguments = (size, store.port, Path(sys.argv[2]), sys.argv[3:])
    multiprocessing.start_processes(run_rank, arguments, nprocs=size, start_method="fork")
