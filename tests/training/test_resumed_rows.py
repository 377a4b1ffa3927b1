"""A resumed run sees the rows that an uninterrupted one would have seen, or none."""

import json
import shutil
from functools import partial

import pytest

from dpo_wrapper.data.example_table import ExampleTable, TableRow
from dpo_wrapper.data.examples import TokenizedExample
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.data.prepare.run import prepare_data
from dpo_wrapper.data.table_digest import digest_table
from dpo_wrapper.training.train import train
from helpers.datasets import write_rows
from helpers.runs import (
    assert_metrics_close,
    interrupt_training,
    make_config,
    read_metrics,
    run_in_two_processes,
)

PAIRS = [{"prompt": f"{k}+{k}?", "chosen": str(2 * k), "rejected": f"no, {k}"} for k in range(12)]


@pytest.fixture(scope="module")
def prepared(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare_data(PrepareConfig(data=rows, out=folder, workers=1, max_length=128))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("is_prepared", [False, True])
def test_with_another_number_of_workers(finished_run, rows, prepared, tmp_path, is_prepared):
    """In the middle of the first epoch, in which a checkpoint is one step behind."""
    config = partial(make_config, prepared if is_prepared else rows, tmp_path / "out", save_steps=2)
    with interrupt_training("dpo", after_steps=3):
        train(config(num_workers=0))
    train(config(num_workers=2))
    assert read_metrics(tmp_path / "out") == read_metrics(finished_run)
    weights = [folder / "model.safetensors" for folder in (finished_run, tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


SCRIPT = """
import sys
from contextlib import nullcontext
from pathlib import Path
import torch
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from helpers.runs import SMALL_DECODER, interrupt_training, make_config

torch.set_num_threads(1)
PRESETS["tiny"] = SMALL_DECODER
data, out, is_interrupted = sys.argv[1:]
with interrupt_training("dpo", after_steps=3) if is_interrupted == "True" else nullcontext():
    train(make_config(Path(data), Path(out), save_steps=2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("is_prepared", "begins_with_two"), [(False, True), (True, False)])
def test_with_another_number_of_processes(
    finished_run, rows, prepared, tmp_path, is_prepared, begins_with_two
):
    data, out, script = prepared if is_prepared else rows, tmp_path / "out", tmp_path / "script.py"
    script.write_text(SCRIPT)
    if begins_with_two:
        run_in_two_processes(script, data, out, True)
        train(make_config(data, out, save_steps=2))
    else:
        with interrupt_training("dpo", after_steps=3):
            train(make_config(data, out, save_steps=2))
        run_in_two_processes(script, data, out, False)
    assert_metrics_close(read_metrics(finished_run), read_metrics(out))


@pytest.mark.slow
@pytest.mark.parametrize("is_prepared", [False, True])
def test_rows_that_have_changed_are_refused(tmp_path, is_prepared):
    raw, eval_file = (write_rows(tmp_path / name, PAIRS) for name in ("rows.jsonl", "eval.jsonl"))
    data = tmp_path / "prepared" if is_prepared else raw

    def write(changed):
        write_rows(raw, [{**row, **changed} if k == 7 else row for k, row in enumerate(PAIRS)])
        if is_prepared:
            shutil.rmtree(data, ignore_errors=True)
            prepare_data(PrepareConfig(data=raw, out=data, workers=1, max_length=128))

    write({})
    config = make_config(data, tmp_path / "out", eval_data=eval_file, sft_epochs=0, save_steps=1)
    with interrupt_training("dpo", after_steps=2):
        train(config)
    begun = (tmp_path / "out" / "run.json").read_bytes()
    for changed in ({"chosen": "15"}, {"rejected": "n"}, {"weight": 2.0}, {"margin": 0.5}):
        write(changed)
        with pytest.raises(
            ValueError, match=rf"^the rows should be those .*, but {data} of --data has changed"
        ):
            train(config)
    write({})
    write_rows(eval_file, PAIRS[1:])
    with pytest.raises(
        ValueError, match=rf"{eval_file} of --eval-data has changed: put it back, or name a new"
    ):
        train(config)
    assert (tmp_path / "out" / "run.json").read_bytes() == begun
    write_rows(eval_file, PAIRS)
    run = train(config)
    assert set(json.loads(run.run_file.read_text())["rows"]) == {"data", "eval_data"}


def test_a_digest_is_that_of_what_is_learned():
    """Wherever the rows stand; one value more or less, or elsewhere, gives another one."""

    def digest(*changes, **row):
        values = {"prompt": (1, 2), "completions": ((3,), (4, 5)), "source": "a, line 1"}
        examples = [TokenizedExample(**(values | changed)) for changed in ({}, *changes)]
        return digest_table(ExampleTable.from_rows([TableRow(example, **row) for example in examples]))

    changes = [
        {"prompt": (1, 3)}, {"prompt": (1,), "completions": ((2, 3), (4, 5))},
        {"completions": ((3, 4), (5,))}, {"completions": ((3,), (4,), (5,))}, {"label": True},
        {"label": False}, {"weight": 0.0}, {"weight": 1.0}, {"margin": 0.0}, {"margin": 1.0},
        {"scored": ((False, False, True), (False, False, True, False))},
        {"scored": ((False, False, True), (False, False, False, True))},
        {"ranks": (0.0, 1.0)}, {"ranks": (1.0, 0.0)}, {"is_document": True, "completions": ((3,),)},
        {"completions": ((3,),)},
    ]  # fmt: skip
    digests = [digest({}), *map(digest, changes), digest(), *(digest(change, {}) for change in changes)]
    assert len(set(digests)) == len(digests)
    assert digest({"source": "b, line 7"}, split="test", prompt_digest=7) == digest({})
    table = ExampleTable.from_rows([])
    assert digest_table(table) == digest_table(ExampleTable([])) != digest()
