"""The changes that a run makes below a folder, each found by Python's audit events, and trouble at each.

A new way to write a file is found as well. What Rust writes (safetensors, tokenizers) has no such event: its
Python functions are wrapped.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

PACKAGE = f"{os.sep}dpo_wrapper{os.sep}"
IS_WRITTEN = os.O_WRONLY | os.O_RDWR | os.O_CREAT
REMOVING = ("os.remove", "os.rmdir", "os.truncate")
KINDS = ("open", "rust", "os.mkdir", "os.link", "os.rename", *REMOVING)

_listeners: list[Callable[..., None]] = []


def _report(event: str, args: tuple[Any, ...]) -> None:
    if _listeners and event in KINDS:
        _listeners[-1](event, *args)


sys.addaudithook(_report)  # for good: there is no way to remove it


class WatchedWrites:
    """Makes trouble at each change below a folder, once at each, over as many runs as it takes.

    A change is what is done to which file, by which lines of the package and, in the steps of a stage, how
    long the log of the run is then.

    Args:
        folder: a run folder.
        troubles: by the kind of a change the functions that are called with the path before it is made, and
            that may raise: the first one when a change is met for the first time, and so on.
        is_once: whether a run meets one trouble at most.
        part: the part of the folder whose changes count.

    Attributes:
        num_met: the number of troubles in the last run.
        names: of the files and folders at which there was trouble.
    """

    def __init__(
        self,
        folder: Path,
        troubles: Mapping[str, Sequence[Callable[[Path], object]]],
        *,
        is_once: bool = False,
        part: str = "",
    ) -> None:
        self.folder, self.part = folder, folder / part
        self.troubles, self.is_once = troubles, is_once
        self.num_met, self.names = 0, set[str]()
        self._seen: dict[tuple[Any, ...], int] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """The context of one run."""
        self.num_met = 0
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, find_path in list_rust_writers():
                patch.setattr(owner, name, self._report_call(getattr(owner, name), find_path))
            _listeners.append(self._meet)
            try:
                yield
            finally:
                _listeners.remove(self._meet)

    def _report_call(self, function: Callable[..., Any], find_path: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._meet("rust", str(find_path(*args, **kwargs)))
            return function(*args, **kwargs)

        return wrapped

    def _meet(self, kind: str, path: Any, *args: Any) -> None:
        if (self.is_once and self.num_met) or not self._is_change(kind, path, *args):
            return
        _listeners.remove(self._meet)  # what follows is not of the run
        try:
            name = Path(path).name if "tmp" not in Path(path).name else "tmp"
            lines = list_lines(sys._getframe())
            log, num_logged = self.folder / "metrics.jsonl", 0
            if log.exists() and any(function == "run_steps" for function, _ in lines):
                num_logged = log.read_bytes().count(b"\n")
            change = (kind, str(Path(path).parent), name, lines, num_logged)
            number = self._seen.get(change, 0)
            if number < len(self.troubles[kind]):
                self._seen[change] = number + 1
                self.num_met += 1
                self.names.add(name)
                self.troubles[kind][number](Path(path))
        finally:
            _listeners.append(self._meet)

    def _is_change(self, kind: str, path: Any, mode: Any = None, flags: Any = None, *_: Any) -> bool:
        if kind not in self.troubles or not isinstance(path, (str, Path)):
            return False
        if kind == "open" and not flags & IS_WRITTEN:
            return False
        if kind in REMOVING and not os.path.isabs(path):  # in a folder that is removed
            return self.part == self.folder
        return Path(path).is_relative_to(self.part)


def list_rust_writers() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Functions that write without an audit event, and functions of their arguments that say where."""
    import safetensors.torch
    from transformers import PreTrainedTokenizerFast

    return [
        (safetensors.torch, "serialize_file", lambda tensors, file, metadata=None: file),
        (
            PreTrainedTokenizerFast,
            "_save_pretrained",
            lambda self, save_directory, *_, **__: Path(save_directory) / "tokenizer.json",
        ),
    ]


def list_lines(frame: FrameType | None) -> tuple[tuple[str, int], ...]:
    """The lines of the package that are running, by function and number, the innermost first."""
    lines = []
    while frame is not None:
        if PACKAGE in frame.f_code.co_filename:
            lines.append((frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


def refuse(path: Path) -> None:
    """What a full disk does where there is no room for a name."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def limit_files(path: Path) -> None:
    """Let the system cut files at the first bytes that are written to this one, until `free_files`."""
    import resource

    size = path.stat().st_size if path.is_file() else 0
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, hard))


def free_files() -> None:
    """Let files have any length again."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
