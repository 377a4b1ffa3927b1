"""Runs that a signal ends at a moment of some kind: inside a checkpoint, an evaluation, the last save.

A run notes in a file beside its folder when such a moment begins and ends. From a whole run a test knows how
many there are and how long they take, and it chooses one, and a time within it, for another run.
"""

import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

KINDS = ("run", "checkpoint", "evaluation", "save")
"""Of moments. The first is the whole run, and so all that is of no other kind."""


@contextmanager
def watch_moments(out: Path) -> Iterator[None]:
    """A run inside notes its moments, and is ended in the one that `plan_end` has chosen, if it has."""
    from dpo_wrapper.training.evaluator import Evaluator
    from dpo_wrapper.training.run_folder import RunFolder

    file = os.open(moments_file(out), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    plan: dict[str, Any] = json.loads(plan_file(out).read_text()) if plan_file(out).exists() else {}
    plan_file(out).unlink(missing_ok=True)
    counts: Counter[str] = Counter()

    def note(event: str, kind: str = "") -> None:
        os.write(file, f"{time.perf_counter()} {event} {kind}\n".encode())

    def end_run(*_: object) -> None:
        note("signal")
        os.kill(os.getpid(), plan["number"])

    @contextmanager
    def moment(kind: str) -> Iterator[None]:
        note("begin", kind)
        counts[kind] += 1
        if (kind, counts[kind]) == (plan.get("kind"), plan.get("count")):
            # the kernel ends a process at SIGALRM as at SIGKILL: at once, and whatever it does
            signal.signal(signal.SIGALRM, signal.SIG_DFL if plan["number"] == signal.SIGKILL else end_run)
            signal.setitimer(signal.ITIMER_REAL, plan["seconds"])
        yield
        note("end", kind)

    def watch(owner: type, name: str, kind: str, call: Callable[..., Any]) -> None:
        method = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **options: call(kind, lambda: method(*args, **options)))

    @contextmanager
    def enter(kind: str, make_context: Callable[[], AbstractContextManager[Any]]) -> Iterator[Any]:
        with moment(kind), make_context() as value:
            yield value

    def call(kind: str, function: Callable[[], Any]) -> Any:
        with moment(kind):
            return function()

    with pytest.MonkeyPatch.context() as patch, moment("run"):
        watch(RunFolder, "new_checkpoint", "checkpoint", enter)
        watch(RunFolder, "new_model_folder", "save", enter)
        watch(Evaluator, "evaluate_splits", "evaluation", call)
        yield


def plan_end(out: Path, kind: str, number: int, durations: list[float], rng: random.Random) -> None:
    """Choose a moment of a kind, and a time within it, at which a run into `out` gets a signal.

    Args:
        durations: of all moments of this kind in a whole run, in seconds.
    """
    index = rng.randrange(len(durations))
    seconds = max(1e-6, rng.random() * durations[index])
    plan = {"kind": kind, "count": index + 1, "seconds": seconds, "number": int(number)}
    plan_file(out).write_text(json.dumps(plan))


def read_durations(out: Path) -> dict[str, list[float]]:
    """The durations of the moments of a whole run, by kind, in their order."""
    begun: dict[str, float] = {}
    durations: dict[str, list[float]] = defaultdict(list)
    for seconds, event, kind in read_events(out):
        if event == "begin":
            begun[kind] = seconds
        else:
            durations[kind].append(seconds - begun[kind])
    return durations


def find_moment(out: Path) -> str | None:
    """The kind of the moment in which a run was ended; None if it was not."""
    kinds = []
    for _, event, kind in read_events(out):
        if event == "signal":
            break
        if event == "begin":
            kinds.append(kind)
        else:
            kinds.pop()
    return kinds[-1] if kinds else None


def read_events(out: Path) -> list[tuple[float, str, str]]:
    lines = (line.split(" ") for line in moments_file(out).read_text().splitlines())
    return [(float(seconds), event, kind) for seconds, event, kind in lines]


def moments_file(out: Path) -> Path:
    return out.with_suffix(".moments")


def plan_file(out: Path) -> Path:
    return out.with_suffix(".plan")
