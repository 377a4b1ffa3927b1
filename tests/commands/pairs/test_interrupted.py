"""Work that is interrupted goes on to the same bytes, and with the same settings alone."""

import signal
import time
from contextlib import contextmanager

import pytest

from dpo_wrapper.commands.pairs import samples
from dpo_wrapper.commands.pairs.progress_file import ProgressFile
from dpo_wrapper.commands.pairs.samples import plan_batches
from helpers.forked_scripts import ForkedCommand
from helpers.pairs import LOGS, NEW_TOKENS, read_rows, write_rows
from helpers.runs import ROOT


class KilledError(Exception):
    pass


@contextmanager
def kill_after(num_records):
    """End the process, so to say, when so many records are written."""
    append, written = ProgressFile.append, 0

    def kill(self, record):
        nonlocal written
        if written == num_records:
            raise KilledError
        append(self, record)
        written += 1

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(ProgressFile, "append", kill)
        yield


def test_work_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(make, rules, tmp_path):
    options = {"judge": f"{rules}:size", "num_samples": 2}
    make("whole.jsonl", **options)
    expected, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "pairs.jsonl"
    progress = tmp_path / "pairs.jsonl.progress"
    for num_records in range(4):  # three batches of four samples, and one of scores
        with kill_after(num_records):
            make(**options)
        assert not out.exists() and len(read_rows(progress)) == 1 + num_records
        progress.write_bytes(progress.read_bytes() + b'{"batch": ')
        make(**options)
        assert out.read_bytes() == expected and not progress.exists()
        out.unlink()


def test_a_prompt_is_not_sampled_twice(make, monkeypatch):
    with kill_after(1):
        make()
    lengths, generate = [], samples.generate

    def generate_and_count(model, prompts, *args, **kwargs):
        lengths.extend(map(len, prompts))
        return generate(model, prompts, *args, **kwargs)

    monkeypatch.setattr(samples, "generate", generate_and_count)
    make()
    assert lengths == [4, 3]  # the shorter two, behind a batch of four


def test_other_options_and_a_finished_file_are_refused(make, logs, tmp_path):
    with kill_after(1):
        make()
    with pytest.raises(
        ValueError, match=r"same settings, but temperature was 1\.0 and is 0\.5: repeat the first"
    ):
        make(temperature=0.5)
    write_rows(logs, LOGS[:5])
    with pytest.raises(ValueError, match="but logs are not what they were"):
        make()
    write_rows(logs, LOGS)
    make()
    with pytest.raises(
        ValueError, match=r"--out should be a new file, but .*pairs.jsonl is there and finished"
    ):
        make()


@pytest.mark.parametrize("by", ["file", "folder", "link"])
def test_an_output_that_is_one_of_the_logs_is_not_to_be_deleted(make, logs, tmp_path, by):
    (tmp_path / "link.jsonl").symlink_to(logs)
    data, out = (tmp_path if by == "folder" else logs), ("link.jsonl" if by == "link" else "logs.jsonl")
    with pytest.raises(
        ValueError, match=rf"--out should be a new file, but \S+{out} is one of the logs: name another\.$"
    ):
        make(out, data=(data,))
    assert read_rows(logs) == LOGS


def test_a_judge_that_fails_loses_no_samples_and_may_be_corrected(make, rules, monkeypatch):
    options = {"judge": f"{rules}:fails", "num_samples": 2}
    with pytest.raises(ValueError, match="but it raised ZeroDivisionError"):
        make(**options)
    rules.write_text("def fails(prompt, answer): return len(answer)\n")
    monkeypatch.setattr("dpo_wrapper.commands.pairs.samples.generate", None)
    rows = make(**options)
    assert len(rows) > 3


def test_batches_are_full_and_of_similar_length():
    assert plan_batches([2, 9, 1, 4], 1, 2) == [[(1, 0), (3, 0)], [(0, 0), (2, 0)]]
    assert plan_batches([1, 2], 3, 4) == [[(1, 0), (1, 1), (1, 2), (0, 0)], [(0, 1), (0, 2)]]


@pytest.mark.slow
def test_a_signal_ends_the_command_with_how_to_go_on(make, logs, model, tmp_path):
    write_rows(logs, LOGS * 12)
    make("whole.jsonl")
    out = tmp_path / "pairs.jsonl"
    options = ["--model", model, "--max-new-tokens", NEW_TOKENS, "--batch-size", 4, "--cpu"]
    command = ForkedCommand(tmp_path / "printed", ROOT, "dpo-wrapper", "pairs", logs, "--out", out, *options)
    progress = tmp_path / "pairs.jsonl.progress"
    while not (progress.exists() and progress.read_bytes().count(b"\n") > 2):
        assert command.process.is_running(), command.errors
        time.sleep(0.01)
    command.process.terminate()
    assert command.status == 128 + signal.SIGTERM and not out.exists()
    assert "the same command goes on with it." in command.errors
    make()
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
