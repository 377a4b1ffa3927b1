"""A run folder that cannot be written: what helps depends on the error, which libraries word differently."""

import errno
import os

import pytest
from safetensors import SafetensorError

from dpo_wrapper.data.writable import check_writable
from dpo_wrapper.training.stopping import TrainingError
from dpo_wrapper.training.write_errors import explain_write_errors


@pytest.mark.parametrize(
    "error, remedy",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "make room"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room"),
        (Exception(f"Disk quota exceeded (os error {errno.EDQUOT})"), "make room"),
        (RuntimeError("CheckpointException: rank 0: No space left on device"), "make room"),
        (Exception("File too large (os error 27)"), "mend that"),
        (SafetensorError("I/O error: Input/output error"), "mend that"),
        (PermissionError(errno.EACCES, "Permission denied"), "mend that"),
    ],
)
def test_what_helps(tmp_path, error, remedy):
    with pytest.raises(TrainingError) as raised, explain_write_errors(tmp_path):
        raise error
    assert str(raised.value) == (
        f"the run should be able to write to {tmp_path}, but it cannot ({error}): {remedy}, and the same "
        "command continues it."
    )


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file"), Exception("(os error 2)")]
)
def test_a_folder_that_is_gone(tmp_path, error):
    sentence = "the folder is not there any more: put it back, and the same command continues the run"
    with pytest.raises(TrainingError, match=sentence), explain_write_errors(tmp_path / "gone"):
        raise error


def test_other_errors_stay():
    for error in (
        TrainingError("No space left on device: make some"),
        RuntimeError("wrong shape"),
    ):
        with pytest.raises(type(error)) as raised, explain_write_errors("out"):
            raise error
        assert raised.value is error


def test_a_disk_that_is_full_before_the_run(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot \(No space left on device\): make room, or name another"):
        check_writable(tmp_path)
