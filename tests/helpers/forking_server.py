"""`python -m helpers.forking_server`: forks the processes that `helpers.forked_scripts` asks for.

It has imported the libraries, which takes longer than most scripts run. Processes that belong together find
each other as those of `torch.distributed.run` do: in a store that is there before them. When one of them
fails, the others get SIGTERM, as they do there.
"""

import faulthandler
import gc
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import peft  # noqa: F401
import pyarrow
import transformers.models.llama.modeling_llama  # noqa: F401
import x_transformers  # noqa: F401
from torch import distributed
from torch.distributed import checkpoint, fsdp  # noqa: F401

import dpo_wrapper.training.train  # noqa: F401
from helpers.counted_script import run_counted
from helpers.forked_scripts import TIME_OF_DUMP

STORES: list[Any] = []
"""Kept until the process ends: in a fork, the end of one would wait for threads that are not there."""


def serve() -> NoReturn:
    """Fork a process for each line of the input, and print its number."""
    pyarrow.array([""])  # imports pandas, if there is one
    gc.freeze()  # what is imported need not be looked at again in each fork
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever ends is gone at once
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
            end_with(run_script, **json.loads(line))
        print(pid, flush=True)
    sys.exit()


def end_with(function: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    """End this process with a function, as a program ends with its main module.

    It does not wait for threads: those of gloo may abort a process that ends by itself (torch 2.13).
    """
    code: Any = 1
    try:
        function(*args, **kwargs)
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def run_script(folder: str, size: int, script: list[str], environ: dict[str, str]) -> None:
    """Run a script in so many processes that belong together; 0 is one by itself, this one."""
    for number, name in {0: os.devnull, 1: f"{folder}/stdout", 2: f"{folder}/stderr"}.items():
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ |= environ
    if size == 0:
        sys.argv = script
        runpy.run_path(script[0], run_name="__main__")
    else:
        write_json(Path(folder) / "codes.json", run_ranks(Path(folder), size, script))


def run_ranks(folder: Path, size: int, script: list[str]) -> list[int]:
    """The status of each process of a script."""
    STORES.append(distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(STORES[0].port)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    pids = []
    for rank in range(size):
        pids.append(os.fork())
        if pids[-1] == 0:
            faulthandler.dump_traceback_later(TIME_OF_DUMP)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            end_with(run_counted, folder, script)
    write_json(folder / "pids.json", pids)
    codes: dict[int, int] = {}
    while len(codes) < size:
        pid, status = os.wait()
        if status and not any(codes.values()):
            for other in set(pids) - codes.keys() - {pid}:
                os.kill(other, signal.SIGTERM)
        codes[pid] = os.waitstatus_to_exitcode(status)
    return [codes[pid] for pid in pids]


def write_json(file: Path, value: Any) -> None:
    file.with_suffix(".new").write_text(json.dumps(value))
    os.replace(file.with_suffix(".new"), file)


if __name__ == "__main__":
    serve()
