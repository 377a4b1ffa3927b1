"""FSDP2: what several processes that share the weights train, save and report is what one process does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from helpers.lora_runs import save_decoder
from helpers.recorded_gradients import recorded_gradients
from helpers.runs import (
    SMALL_DECODER,
    assert_metrics_close,
    make_config,
    read_metrics,
    run_in_processes,
)
from helpers.shareable_models import hf

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Trainer
from helpers.curves import unrendered_curves
from helpers.recorded_gradients import recorded_gradients
from helpers.runs import SMALL_DECODER, interrupt_training, make_config, short_samples

torch.set_num_threads(1)
PRESETS["tiny"] = SMALL_DECODER
rows, folder = map(Path, sys.argv[1:3])
train_step = Trainer.train_step

def train_sharded_step(self, *args):
    metrics = train_step(self, *args)
    if self.config.fsdp:  # each process holds its part
        parameters = list(self.module.parameters())
        local = sum(p.to_local().numel() for p in parameters)
        assert local < 1.2 * sum(p.numel() for p in parameters) / self.accelerator.num_processes
    return metrics

Trainer.train_step = train_sharded_step
for job in json.loads(sys.argv[3]):
    config = make_config(rows, folder / job["out"], **job["options"])
    with unrendered_curves(), short_samples():
        if job.get("interrupted"):
            with interrupt_training("dpo", after_steps=3):
                train(config)
            continue
        with recorded_gradients(folder / f"{job['out']}.gradients"):
            train(config)
"""

SHORT = {"sft_epochs": 0, "epochs": 1, "max_steps": 4, "learning_rate": 1e-3, "save_steps": 2}
WATCHED = {"samples": 1, "exact_answers": 4}
UNEVEN = {"micro_batch_tokens": 150}
"""Several micro-batches a step, of which one process has more than another."""

CASES = {
    "decoder": WATCHED | UNEVEN | {"sft_epochs": 1, "keep_best": True},
    "frozen-layers": {"freeze": ("attn_layers[.]layers[.]0",)},
    "labelled-rows": UNEVEN | {"loss": "kto"},
    "llama": WATCHED | {"model": "llama"},
    "llama-tied": UNEVEN | {"model": "tied", "ref_model_sync_steps": 2, "gradient_checkpointing": True},
    "decoder-adapter": UNEVEN | {"model": "decoder", "lora": True, "lora_r": 4},
    "llama-adapter": WATCHED | {"model": "llama", "lora": True, "lora_r": 4, "keep_best": True},
}

RESUMED = {
    "decoder": {"ref_model_sync_steps": 2},
    "llama": {"model": "llama", "epochs": 2, "max_steps": 8},
    "adapter": {"model": "llama", "lora": True, "lora_r": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where models and runs are."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, is_tied in (("llama", False), ("tied", True)):
        options = {"vocab_size": 300, "max_position_embeddings": 128, "tie_word_embeddings": is_tied}
        hf("Llama", **options)(0).save_pretrained(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        save_decoder(folder / "decoder")
    (folder / "script.py").write_text(SCRIPT)
    return folder


def all_options(options, folder):
    """The options of a short run, with the model's folder and tokenizer."""
    own = {"model": str(folder / options["model"]), "tokenizer": "bytes"} if "model" in options else {}
    return SHORT | {"samples": 0, "exact_answers": 0} | options | own


def run_jobs(number, rows, folder, jobs):
    """Run jobs in so many processes, or in this one."""
    jobs = [job | {"options": all_options(job["options"], folder)} for job in jobs]
    if number > 1:
        run_in_processes(number, folder / "script.py", rows, folder, json.dumps(jobs))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        for job in jobs:
            with recorded_gradients(folder / f"{job['out']}.gradients"):
                train(make_config(rows, folder / job["out"], **job["options"]))


@pytest.fixture(scope="module")
def sharded_runs(rows, folder):
    run_jobs(2, rows, folder, [{"out": f"two/{n}", "options": o | {"fsdp": True}} for n, o in CASES.items()])
    return folder / "two"


@pytest.fixture(scope="module")
def resumed_runs(rows, folder):
    """Of each case a whole run of two processes, and runs of other numbers that go on from its middle."""
    jobs = []
    for name, options in RESUMED.items():
        sharded = options | {"fsdp": True}
        jobs.append({"out": f"{name}-whole", "options": sharded})
        jobs.append({"out": f"{name}-2-2", "options": sharded, "interrupted": True})
    jobs.append({"out": "llama-ddp-2", "options": RESUMED["llama"], "interrupted": True})
    run_jobs(2, rows, folder, jobs)
    for name, end in ENDS:
        if end != "ddp-2":
            shutil.copytree(folder / f"{name}-2-2", folder / f"{name}-{end}")
    shards = [path for path in folder.rglob("shards") if path.is_dir()]
    assert len(shards) == len(RESUMED) + len(ENDS) - 1
    for path in shards:
        (path / ".metadata").write_bytes(PICKLE % str(folder / "was-read").encode())
    runs = [*((name, "2-2") for name in RESUMED), *ENDS]
    for number, ends in {1: ["2-1"], 2: ["2-2", "ddp-2", "2-ddp"], 3: ["2-3"]}.items():
        jobs = [
            {"out": f"{name}-{end}", "options": RESUMED[name] | {"resume": True, "fsdp": end[-1] in "23"}}
            for name, end in runs
            if end in ends
        ]
        run_jobs(number, rows, folder, jobs)
    return folder


ENDS = [
    ("decoder", "2-1"), ("llama", "2-1"), ("adapter", "2-1"), ("decoder", "2-3"), ("adapter", "2-3"),
    ("llama", "ddp-2"), ("llama", "2-ddp"),
]  # fmt: skip
"""Cases, and the processes that a run has before and after it is interrupted: sharded ones, 1, or DDP."""

PICKLE = b"cos\nsystem\n(S'touch %s'\ntR."
"""What runs a command where it is unpickled."""


def load_weights(run):
    name = "model" if (run / "model.safetensors").exists() else "adapter_model"
    return load_file(run / f"{name}.safetensors")


def assert_weights_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.pitfall(19)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(name, rows, folder, sharded_runs):
    run_jobs(1, rows, folder, [{"out": f"one/{name}", "options": CASES[name]}])
    one, two = folder / "one" / name, sharded_runs / name
    gradients, expected = (load_file(f"{run}.gradients") for run in (two, one))
    assert gradients.keys() == expected.keys() and any(value.any() for value in expected.values())
    for key, value in expected.items():
        margin = 1e-3 * float(value.abs().max()) + 1e-6
        torch.testing.assert_close(gradients[key], value, rtol=1e-3, atol=margin, msg=key)
    assert_weights_close(load_weights(two), load_weights(one))
    assert_metrics_close(read_metrics(one), read_metrics(two))
    assert {file.name for file in two.iterdir()} == {file.name for file in one.iterdir()}
    for file in {"config.json", "samples.jsonl"} & {file.name for file in two.iterdir()}:
        assert (one / file).read_text() == (two / file).read_text()


@pytest.mark.parametrize("name", RESUMED)
def test_the_same_number_of_processes_resumes_to_the_bit(name, resumed_runs):
    whole, resumed = (resumed_runs / f"{name}-{end}" for end in ("whole", "2-2"))
    expected, weights = load_weights(whole), load_weights(resumed)
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    assert read_metrics(resumed) == read_metrics(whole)


@pytest.mark.parametrize(("name", "end"), ENDS)
def test_another_number_of_processes_resumes_to_the_same_result(name, end, resumed_runs):
    whole, resumed = resumed_runs / f"{name}-whole", resumed_runs / f"{name}-{end}"
    assert_weights_close(load_weights(resumed), load_weights(whole))
    assert_metrics_close(read_metrics(whole), read_metrics(resumed))
    assert not (resumed_runs / "was-read").exists()
