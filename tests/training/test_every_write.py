"""A run that meets trouble at each of its writes: a full disk, SIGTERM, its folder taken away.

It is continued by the same command after each, and meets the next one.
"""

import gc
import json
import os
import re
import signal
import sys

import pytest

from dpo_wrapper import cli
from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.training import command_line
from dpo_wrapper.training.best_model import BestEvaluation
from dpo_wrapper.training.checkpoint_folder import CheckpointFolder, sort_key
from dpo_wrapper.training.monitoring import figure
from helpers.models import hf_llama
from helpers.runs import make_config, read_metrics
from helpers.tokenizers import save_tokenizer
from helpers.watched_writes import KINDS, WatchedWrites, free_files, limit_files, refuse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals, and limits on the length of files"),
]

PAIRS = {"sft_epochs": 0, "epochs": 1, "batch_size": 16, "max_length": 16, "share_prefix": "never"}
PAIRS |= {"samples": 0, "exact_answers": 0, "eval_steps": 1, "save_steps": 1}
BEST = {"keep_best": True, "samples": 1, "precompute_ref_log_probs": True}
RUNS = {
    "two stages": PAIRS | BEST | {"sft_epochs": 1},
    "one step": PAIRS | BEST | {"batch_size": 32},
    "no checkpoints": PAIRS | {"batch_size": 32, "save_steps": 0},
    "best without checkpoints": PAIRS | {"keep_best": True, "save_steps": 0},
    "hugging face": PAIRS | {"batch_size": 32},
    "lora": PAIRS | {"batch_size": 32, "lora": True},
}
PARTS = {"hugging face": "model.new", "lora": "model.new"}
"""Of a run folder, in which a run differs from others."""


class Command:
    """The command of a run, in any folder, and the result of a run without trouble in the folder `whole`."""

    def __init__(self, name, options, capsys, monkeypatch, whole):
        self.name, self.options = name, options
        self.capsys, self.monkeypatch, self.whole = capsys, monkeypatch, whole

    def run(self, out):
        """Exit status and sentences."""
        config, status = make_config(out=out, **self.options), 0
        self.monkeypatch.setattr(command_line, "parse_arguments", lambda _: (config, False))
        try:
            cli.main(["train"])
        except SystemExit as exit_:
            status = exit_.code
        lines = self.capsys.readouterr().err.splitlines()
        return status, [line for line in lines if line.startswith("dpo-wrapper: ")]

    def repeat(self, out, check, troubles, **options):
        """Run until there is no more trouble, or the run is finished; returns how often, and the changes.

        `check` is called with what each run says of its trouble. Checkpoints are whole, and the newest one is
        never lost; the model cannot be loaded before it is whole.
        """
        writes = WatchedWrites(out, troubles, part=PARTS.get(self.name, ""), **options)
        newest, number = (-1,), 0
        while read_status(out) != "finished":
            number += 1
            with writes.watch():
                try:
                    said = self.run(out)
                finally:
                    free_files()
            if not writes.num_met or (read_status(out) == "finished" and said == (0, [])):
                assert said == (0, [])
                break
            check(*said)
            status, before, newest = read_status(out), newest, find_newest(out)
            assert newest >= before or status == "trained"
            if status == "training":
                with pytest.raises(ValueError, match="has not finished"):
                    load_pretrained(str(out), None, 16)
        return number, writes.names

    def assert_same_result(self, out):
        (weights,) = (file.name for file in self.whole.glob("*model.safetensors"))
        assert (out / weights).read_bytes() == (self.whole / weights).read_bytes()
        expected, metrics = read_metrics(self.whole), read_metrics(out)
        if self.name == "no checkpoints":  # from which the last evaluation could be made again
            assert {"train", "eval"} >= {record["part"] for record in expected[len(metrics) :]}
            expected = expected[: len(metrics)]
        assert metrics == expected
        left = {file.name for file in out.iterdir()} - {file.name for file in self.whole.iterdir()}
        assert all(re.fullmatch(r"metrics\.\d+\.jsonl|run\.lock", name) for name in left)


def read_status(out):
    file = out / "run.json"
    return json.loads(file.read_text())["status"] if file.exists() else None


def find_newest(out):
    """How far the newest whole checkpoint is."""
    progress, _ = CheckpointFolder(out / "checkpoints", 1).find_newest(None)
    return (-1,) if progress is None else sort_key(progress.checkpoint_name)


@pytest.fixture(scope="module")
def whole_runs():
    return {}


@pytest.fixture
def command(request, rows, monkeypatch, capsys, whole_runs, tmp_path_factory):
    """The command of a run whose best evaluation is that after the first step of two; its plots are none."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it takes longer than all else
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    monkeypatch.setattr(figure, "plot_curves", lambda _, path, title: write_whole(path, "a plot"))
    observe = BestEvaluation.observe
    monkeypatch.setattr(
        BestEvaluation, "observe", lambda self, step, _: observe(self, step, {"loss": abs(step - 1)})
    )
    name = request.param
    if name not in whole_runs:
        whole_runs[name] = tmp_path_factory.mktemp("whole")
        if name in ("hugging face", "lora"):
            model = hf_llama(0, vocab_size=420, max_position_embeddings=64)
            model.save_pretrained(whole_runs[name] / "llama")
            save_tokenizer(whole_runs[name] / "llama")
    model = whole_runs[name] / "llama"
    options = RUNS[name] | ({"model": str(model)} if model.exists() else {})
    command = Command(name, options | {"data": rows}, capsys, monkeypatch, whole_runs[name] / "out")
    if not command.whole.exists():
        assert command.run(command.whole) == (0, [])
    return command


def runs(*names):
    return pytest.mark.parametrize("command", names, indirect=True)


@runs("two stages", "no checkpoints", "hugging face", "lora")
def test_a_full_disk(command, tmp_path):
    """Each file is cut at its first bytes by the system, and each new name is refused."""
    out = tmp_path / "out"
    unwritten = re.compile(
        rf"dpo-wrapper: the run should be able to write to {out}, but it cannot \(.*("
        r"No space left on device.*\): make room|File too large.*\): mend that), and the same command "
        "continues it."
    )
    unusable = (
        f"dpo-wrapper: --out should be a folder that can be written, but {out} cannot (No space left on "
        "device): make room, or name another."
    )

    def check(status, sentences):
        (sentence,) = sentences
        assert sentence == unusable or (unwritten.fullmatch(sentence) and status == 1)

    names = ("os.mkdir", "os.link", "os.rename")
    troubles = {"open": [limit_files, refuse], "rust": [limit_files], **{name: [refuse] for name in names}}
    number, changed = command.repeat(out, check, troubles)
    command.assert_same_result(out)
    assert number > 12
    if command.name == "two stages":
        assert changed >= {f"{name}.new" for name in ("run.json", "samples.jsonl", "curves.png", "README.md")}
        assert changed >= {"metrics.jsonl", "best.new", "best.safetensors", "state.safetensors", "sft.new"}
        assert number > 150 and changed >= {"run.lock", "progress.json.new", "part-00000.new", "dpo-0.new"}
    else:
        assert changed >= {"model.new", "adapter_config.json" if command.name == "lora" else "config.json"}
        assert ("tokenizer.json" in changed) == (command.name in PARTS)


@runs("two stages", "best without checkpoints", "hugging face", "lora")
def test_sigterm(command, tmp_path):
    out, before = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    unstarted = "dpo-wrapper: interrupted before anything was done."
    stopped = "dpo-wrapper: the run was interrupted; the same command {} in " + f"{out}."

    def check(status, sentences):
        has_checkpoint = read_status(out) == "trained" or find_newest(out) > (-1,)
        goes_on = "continues it" if has_checkpoint else "begins it again, for it has no checkpoint,"
        assert status == 128 + signal.SIGTERM and sentences[0] in (unstarted, stopped.format(goes_on))
        assert len(sentences) == 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as the next process has it

    def kill(_):
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        number, _ = command.repeat(out, check, {kind: [kill] for kind in KINDS}, is_once=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    command.assert_same_result(out)
    assert number > 15


@runs("one step", "hugging face")
def test_a_folder_that_is_taken_away(command, tmp_path):
    """And brought back, before the command is repeated."""
    out, away = tmp_path / "out", tmp_path / "away"
    gone = (
        f"dpo-wrapper: the run should be able to write to {out}, but the folder is not there any more: put "
        "it back, and the same command continues the run."
    )
    unusable = (
        f"dpo-wrapper: --out should be a folder that can be written, but {out} cannot (No such file or "
        "directory): name another."
    )

    def check(status, sentences):
        assert (status, sentences) in ((1, [gone]), (2, [unusable]), (1, [unusable]))
        assert not out.exists()
        os.rename(away, out)

    def take(_):
        os.rename(out, away)

    out.mkdir()
    number, _ = command.repeat(out, check, {"open": [take], "rust": [take]}, is_once=True)
    command.assert_same_result(out)
    assert number > 7
