"""Why a run stops before its end: a signal, or something that only a person can mend."""

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


class TrainingError(RuntimeError):
    """Says in one sentence why a run cannot go on. Its last checkpoint stays."""


class NonFiniteError(TrainingError):
    """An evaluation has a loss that is not finite, so that its model is of no use."""


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """The context in which the end of another process, without which none can go on, is a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        distributed = torch.distributed
        is_known = distributed.is_available() and isinstance(error, distributed.DistError)
        if not (is_known or "gloo/transport" in str(error)):
            raise
        raise TrainingError(
            "all processes should go on to the end of the run, but another one has ended: look for its "
            "reason, and the same command continues the run."
        ) from error


class StoppedBySignal(KeyboardInterrupt):
    """A signal has stopped a run, after a checkpoint if it came during the steps of a stage.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class EvaluationInterrupted(KeyboardInterrupt):
    """A signal came during an evaluation, which a checkpoint written now leaves out."""


class StopRequest:
    """Notes SIGINT and SIGTERM inside its context, so that a run can finish its step and write a checkpoint.

    A second signal acts as it would outside of the context. A signal that is ignored outside stays ignored.

    Attributes:
        number: of the signal that came; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def interrupt(self) -> None:
        """Raise EvaluationInterrupted if a signal has come."""
        if self.number is not None:
            raise EvaluationInterrupted

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()
        name = signal.Signals(number).name
        what = "the run writes a checkpoint after this step or batch, and stops; repeat it to stop now"
        os.write(2, f"\n{name}: {what}\n".encode())  # a handler may run in the middle of a print


def raise_at_sigterm() -> None:
    """Let SIGTERM raise StoppedBySignal from now on, as SIGINT raises KeyboardInterrupt."""

    def stop(number: int, _: FrameType | None) -> None:
        raise StoppedBySignal(number)

    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)


def ignore_signals(_: int) -> None:
    """What a worker process does at its start: a signal to all processes is answered by the main process.

    Workers end with it, or when it is done with them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def check_finite(stage: str, step: int, name: str, value: float) -> None:
    """Raise NonFiniteError if a loss is not finite."""
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {name} should be finite, but at step {step} of {stage} it is {value}: begin a new run with "
            "a lower learning rate or --max-grad-norm."
        )
