"""Memory that does not suffice: one sentence with what helps, and the last checkpoint stays whole."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dpo_wrapper import cli
from dpo_wrapper.batches import TreeOptions
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.collate import collate_preference
from dpo_wrapper.training import checkpoint, setup, stages, train
from dpo_wrapper.training.out_of_memory import (
    advise_on_steps,
    advise_on_weights,
    explain_out_of_memory,
    is_out_of_memory,
)
from dpo_wrapper.training.stopping import TrainingError
from helpers.datasets import write_rows
from helpers.runs import ROOT, make_config, read_metrics

ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 1500000000 bytes. Error code 12 (Cannot allocate memory)"
)
ON_CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
ERRORS = [
    MemoryError(),
    MemoryError("std::bad_alloc"),
    RuntimeError(ON_CPU),
    torch.OutOfMemoryError(ON_CUDA),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("unable to mmap 538090408 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    SafetensorError("Error while deserializing header: Cannot allocate memory (os error 12)"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    TrainingError("out of memory"),  # it is a sentence already
    ValueError("out of memory"),
    KeyboardInterrupt(),
]


def test_errors_of_memory_are_told_from_others():
    assert [is_out_of_memory(error) for error in ERRORS] == [True] * len(ERRORS)
    assert [is_out_of_memory(error) for error in OTHERS] == [False] * len(OTHERS)


@pytest.mark.parametrize(
    ("error", "size"), [(ERRORS[0], ""), (ERRORS[2], " (1.5 GB more)"), (ERRORS[3], " (2.1 GB more)")]
)
def test_the_sentence_says_what_does_not_fit_and_what_helps(error, size):
    with pytest.raises(TrainingError) as caught, explain_out_of_memory("step 3", lambda: "take less"):
        raise error
    expected = f"step 3 should fit in memory, but it needs more than there is{size}: take less."
    assert str(caught.value) == expected


def test_other_errors_pass():
    for error in OTHERS:
        with pytest.raises(type(error)) as caught, explain_out_of_memory("step 3", lambda: "take less"):
            raise error
        assert caught.value is error


def test_what_helps_is_what_is_not_done_yet(tmp_path):
    def advise(**options):
        return advise_on_steps(make_config(tmp_path, tmp_path, **options))

    config, hub = make_config(tmp_path, tmp_path), {"model": "some/model"}
    assert advise().startswith("lower --micro-batch-tokens to 8192, and --resume continues from the last")
    assert advise(**hub).startswith("lower --micro-batch-tokens to 8192 or add --gradient-checkpointing, and")
    assert advise(gradient_checkpointing=True, **hub).startswith("lower --micro-batch-tokens to 8192, and")
    pairs = [TokenizedExample((k, 2, 3), ((4, 5), (6,))) for k in range(4)]
    batch, alone = collate_preference(pairs), collate_preference(pairs[:1])  # of 6 padded rows of 4 inputs
    assert advise_on_steps(config, [alone, batch]).startswith("lower --micro-batch-tokens to 16, and")
    batch.sequences.prebuild_tree(TreeOptions())  # 4 inputs of each pair, whose rejected side adds none
    assert advise_on_steps(config, [alone, batch]).startswith("lower --micro-batch-tokens to 8, and")
    assert advise_on_steps(config, [alone]).startswith("train a smaller model or shorter rows (--max-length)")
    no_grad = advise_on_steps(make_config(tmp_path, tmp_path, **hub), trains=False)
    assert no_grad.startswith("lower --micro-batch-tokens to 8192, and")
    assert advise_on_weights(make_config(tmp_path, tmp_path)) == (
        "take a smaller model or load its weights in 16 bits (--dtype bfloat16)"
    )
    assert advise_on_weights(make_config(tmp_path, tmp_path, **hub)) == (
        "take a smaller model, train an adapter (--lora) or load its weights in 16 bits (--dtype bfloat16)"
    )
    assert advise_on_weights(make_config(tmp_path, tmp_path, lora=True, dtype="bfloat16", **hub)) == (
        "take a smaller model"
    )


PLACES = [
    (setup, "load_policy", 0, "the model should fit in memory"),
    (train, "create_stage", 0, "the run should fit in memory"),
    (stages.DPOStage, "evaluate", 0, "the evaluation after step 0 of dpo should fit in memory"),
    (stages.DPOStage, "micro_batch_loss", 1, "step 2 of dpo should fit in memory"),
    (checkpoint, "write_state", 2, "the checkpoint after step 2 of dpo should fit in memory"),
]


@pytest.mark.parametrize(("owner", "name", "calls", "sentence"), PLACES, ids=[row[1] for row in PLACES])
def test_each_place_has_its_sentence(rows, tmp_path, monkeypatch, capsys, owner, name, calls, sentence):
    function = getattr(owner, name)

    def fail(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise ERRORS[calls % len(ERRORS)]
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)
    out = tmp_path / "out"
    args = ["train", "--data", rows, "--out", out, "--cpu", "--batch-size", "4", "--max-length", "64"]
    args += ["--sft-epochs", "0", "--save-steps", "1"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(map(str, args)))
    sentences = [s for s in capsys.readouterr().err.splitlines() if s.startswith("dpo-wrapper: ")]
    assert exit_.value.code == 1
    assert len(sentences) == 1 and sentences[0].startswith(f"dpo-wrapper: {sentence}, but it needs more")
    monkeypatch.undo()


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from dpo_wrapper import cli
from dpo_wrapper.batches import TreeOptions
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.collate import collate_preference
from dpo_wrapper.training.trainer import Trainer

GB, at_step = 2**30, int(sys.argv[1])
torch.set_num_threads(1)

def read(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def limit_space(self, step, batches):
    if step == at_step:
        room = {{"lack": read("VmPeak") - GB - read("VmSize"), "room": GB // 2}}["{kind}"]
        assert room > GB // 10, room / GB
        resource.setrlimit(resource.RLIMIT_AS, (read("VmSize") + room,) * 2)
    return train_step(self, step, batches)

train_step, Trainer.train_step = Trainer.train_step, limit_space
cli.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space")
def test_address_space_that_is_1_gb_too_small(tmp_path):
    """Of what step 1 has needed at most, 1 GB is taken away; smaller passes then go on in half a GB."""
    decoder = {"num_tokens": 300, "max_seq_len": 1024}
    layers = {"dim": 64, "depth": 1, "heads": 1, "ff_mult": 384}
    (tmp_path / "decoder.json").write_text(json.dumps(decoder | {"attn_layers": layers}))
    texts = [" ".join(f"{k}-{n}" for n in range(140)) for k in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Q", "completion": text} for text in texts])
    args = ["train", "--data", data, "--out", tmp_path / "out", "--model", tmp_path / "decoder.json", "--cpu"]
    args += ["--batch-size", "8", "--sft-epochs", "3", "--save-steps", "1", "--max-length", "1024"]
    args += ["--eval-fraction", "0", "--samples", "0"]

    def run(kind, step, *more):
        script = LIMITED.format(kind=kind)
        return subprocess.run(
            [sys.executable, "-c", script, str(step), *map(str, [*args, *more])],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    failed = run("lack", 2)
    sentences = [line for line in failed.stderr.splitlines() if line.startswith("dpo-wrapper: ")]
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert len(sentences) == 1 and sentences[0].startswith("dpo-wrapper: step 2 of sft should fit in memory")
    end = "and --resume continues from the last checkpoint, which is whole"
    advised = re.search(rf": lower --micro-batch-tokens to (\d+), {end}\.$", sentences[0])
    assert 2000 < int(advised[1]) < 3000  # half of the tokens of the step
    done = run("room", 2, "--resume", "--micro-batch-tokens", str(int(advised[1]) // 2))
    assert done.returncode == 0, done.stderr
    steps = [record["step"] for record in read_metrics(tmp_path / "out") if record["part"] == "step"]
    assert steps == [1, 2, 3]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
