"""Which checkpoints of a run count, and in which order files are written, flushed, renamed and removed."""

import json
import os
from pathlib import Path

import pytest

from dpo_wrapper.training import checkpoint_folder
from dpo_wrapper.training.checkpoint_folder import CheckpointFolder, Progress


def add_checkpoint(checkpoints, progress, content="state"):
    """A checkpoint of two files, one of them in a folder."""
    checkpoints.create_new(progress)
    folder = checkpoints.new_folder(progress)
    (folder / "shards").mkdir()
    for name in ("state", "shards/0"):
        (folder / name).write_text(content)
    checkpoints.complete(progress)
    return checkpoints.folder(progress)


@pytest.fixture
def checkpoints(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", 2)


def test_the_newest_comes_first(checkpoints):
    made = [
        Progress("dpo", 0), Progress("sft", 10, is_evaluated=True), Progress("sft", 10), Progress("sft", 9),
        Progress("pretrain", 120),
    ]  # fmt: skip
    assert checkpoints.list_names() == [] and checkpoints.find_newest(None) == (None, [])
    for progress in reversed(made):
        add_checkpoint(checkpoints, progress)
    (checkpoints.path / "notes").mkdir()
    (checkpoints.path / "dpo-7").touch()
    names = ["dpo-0", "sft-10-evaluated", "sft-10", "sft-9", "pretrain-120"]
    assert checkpoints.list_names() == names
    assert checkpoints.find_newest("sft-10") == (made[0], [])
    assert [checkpoints.read_progress(name) for name in names] == made


def test_a_damaged_checkpoint_is_passed_over(checkpoints):
    made = [Progress("dpo", step) for step in (1, 2, 3, 4, 5)]
    folders = [add_checkpoint(checkpoints, progress) for progress in made]
    (folders[1] / "state").write_text("stat")
    (folders[2] / "shards" / "0").unlink()
    (folders[3] / "progress.json").write_text('{"stage": "dpo"')
    problems = [
        "dpo-6 is not there",
        "dpo-4 has no progress.json that can be read",
        "dpo-3 lacks shards/0",
        "state of dpo-2 has 4 bytes in place of 5",
    ]
    assert checkpoints.find_newest("dpo-6") == (made[4], problems[:1])
    (folders[4] / "progress.json").write_text("{}")
    problems[1:1] = ["dpo-5 has no progress.json that can be read"]
    assert checkpoints.find_newest("dpo-6") == (made[0], problems)
    (folders[0] / "progress.json").unlink()
    assert checkpoints.find_newest(None) == (
        None,
        [*problems[1:], "dpo-1 has no progress.json that can be read"],
    )


def test_the_last_whole_ones_are_kept(checkpoints):
    folders = [add_checkpoint(checkpoints, Progress("dpo", step)) for step in (1, 2, 3, 4)]
    (folders[2] / "state").unlink()
    checkpoints.create_new(Progress("dpo", 5))
    checkpoints.remove_old()
    assert {path.name for path in checkpoints.path.iterdir()} == {"dpo-2", "dpo-4", "dpo-5.new"}
    (folders[1]).rename(checkpoints.path / "dpo-2.old")
    checkpoints.remove_unfinished()
    assert {path.name for path in checkpoints.path.iterdir()} == {"dpo-4"}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(checkpoints, monkeypatch):
    events = []
    rename = os.rename

    def record_flush(file):
        events.append(Path(os.readlink(f"/proc/self/fd/{file}")))

    def record_rename(source, target):
        events.append((Path(source).name, Path(target).name))
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files are read from /proc")
    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(os, "rename", record_rename)
    add_checkpoint(checkpoints, Progress("dpo", 1))
    new = checkpoints.path / "dpo-1.new"
    at = events.index(("dpo-1.new", "dpo-1"))
    flushed = {new, new / "state", new / "shards", new / "shards" / "0", new / "progress.json"}
    assert flushed <= set(events[:at]) and events[at + 1 :] == [checkpoints.path]


def test_a_run_that_ends_where_it_resumed_keeps_its_checkpoint(checkpoints, monkeypatch):
    """Stopped by a signal after an evaluation that ends its stage early: the same step is completed again."""
    stopped = Progress("dpo", 3, 20, is_evaluated=True)
    folder = add_checkpoint(checkpoints, stopped, "first")
    ended = Progress("dpo", 3, 20, is_evaluated=True, is_trained=True)

    def check_and_remove(path):
        assert checkpoints.find_newest(None) == (ended, [])
        remove_folder(path)

    remove_folder = checkpoint_folder.remove_folder
    checkpoints.create_new(ended)
    monkeypatch.setattr(checkpoint_folder, "remove_folder", check_and_remove)
    checkpoints.complete(ended)
    assert (folder / "state").read_text() == "first" and os.listdir(checkpoints.path) == ["dpo-3-evaluated"]
    assert set(json.loads((folder / "progress.json").read_text())["files"]) == {"state", "shards/0"}


def test_a_damaged_checkpoint_is_replaced(checkpoints):
    folder = add_checkpoint(checkpoints, Progress("dpo", 3))
    (folder / "state").unlink()
    add_checkpoint(checkpoints, Progress("dpo", 3), "again")
    assert (folder / "state").read_text() == "again" and checkpoints.is_whole("dpo-3")
