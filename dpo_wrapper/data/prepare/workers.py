"""Worker processes that make parts."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain

from dpo_wrapper.data.prepare.job import PrepareJob
from dpo_wrapper.data.prepare.part_maker import PartMaker
from dpo_wrapper.data.prepare.parts import Part

_MAKERS: list[PartMaker] = []  # of a worker process


def make_in_workers(job: PrepareJob, parts: Iterable[Part], num_workers: int) -> Iterator[int]:
    """Make parts in worker processes, and yield the number of rows of each, in order.

    A single part is made in this process, and so are all if there is but one worker.

    Raises:
        ExampleError: a row cannot be used; the first such row of the parts that were not made before.
        ValueError: a worker was killed.
    """
    parts = iter(parts)
    first = [part for _, part in zip(range(2), parts, strict=False)]
    if num_workers == 1 or len(first) < 2:
        maker = job.create_maker()
        for part in chain(first, parts):
            yield maker.make(part).num_rows
        return
    method = "fork" if sys.platform == "linux" else "spawn"  # a fork shares what is imported
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context(method), _start_worker, (job, os.getpid())
    )
    pending: deque[Future[int]] = deque()
    try:
        for part in chain(first, parts):
            pending.append(pool.submit(_make_part, part))
            if len(pending) > 2 * num_workers:  # more would fill the memory with rows that wait
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        problem = "the worker processes should run to the end, but one was killed"
        raise ValueError(f"{problem}: give fewer --workers if memory ran out, and run it again.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(job: PrepareJob, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of this process: each worker has a core
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _MAKERS.append(job.create_maker())


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _make_part(part: Part) -> int:
    return _MAKERS[0].make(part).num_rows
