"""Steps whose loss or gradients are not finite: `--on-nan`."""

import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file

from dpo_wrapper.training.monitoring.trackers import Trackers
from dpo_wrapper.training.non_finite import NonFiniteSteps, describe_rows
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.stages import DPOStage
from dpo_wrapper.training.stopping import TrainingError
from dpo_wrapper.training.train import create_stage, train
from dpo_wrapper.training.trainer import Trainer
from helpers.lora_runs import save_llama
from helpers.poisoned_steps import assert_states_equal, copy_state, poison_steps
from helpers.runs import (
    assert_metrics_close,
    interrupt_training,
    make_config,
    read_metrics,
    run_in_two_processes,
)

OPTIONS = {"sft_epochs": 0, "on_nan": "skip", "samples": 0, "exact_answers": 0}


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "betadpo"},
        {"ref_model_sync_steps": 3, "ref_model_mixup_alpha": 1.0},
        pytest.param({"lora": True}, marks=pytest.mark.slow),
        pytest.param({"micro_batch_tokens": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_skipped_step_changes_nothing(rows, tmp_path, capsys, options):
    if "lora" in options:
        save_llama(tmp_path / "llama")
        options = options | {"model": str(tmp_path / "llama")}
    with poison_steps(3, 5) as noted:
        train(make_config(rows, tmp_path / "out", save_steps=0, **(OPTIONS | options)))
    assert len(noted) == 2
    for before, after in noted:
        assert any("exp_avg" in name for name in before)
        assert_states_equal(before, after)
    records = [record for record in read_metrics(tmp_path / "out") if record["part"] == "step"]
    assert [record["step"] for record in records if record["loss"] is None] == [3, 5]
    assert [record["num_skipped"] for record in records[:6]] == [0, 0, 1, 1, 2, 2]
    assert all(record["grad_norm"] is not None for record in records[3::2])
    assert all(math.isfinite(record["loss"]) for record in records[5:])
    printed = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    assert len(printed) == 2
    assert printed[0].startswith("dpo, step 3: the loss is nan, so the step is skipped (") and (
        "rows.jsonl, line " in printed[0]
    )


def test_gradients_that_are_not_finite_are_skipped_too(rows, tmp_path, monkeypatch):
    """A loss that is finite, and infinite gradients."""
    calls, micro_batch_loss = 0, DPOStage.micro_batch_loss

    def poisoned_loss(self, module, batch):
        nonlocal calls
        calls += 1
        loss, metrics = micro_batch_loss(self, module, batch)
        if calls == 2:
            loss.register_hook(lambda grad: grad * math.inf)
        return loss, metrics

    monkeypatch.setattr(DPOStage, "micro_batch_loss", poisoned_loss)
    train(make_config(rows, tmp_path / "out", save_steps=0, **OPTIONS))
    records = [record for record in read_metrics(tmp_path / "out") if record["part"] == "step"]
    assert [record["step"] for record in records if record["grad_norm"] is None] == [2]
    assert records[1]["loss"] is not None and records[-1]["num_skipped"] == 1
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_skipped_steps_are_counted_on_where_a_run_is_resumed(rows, tmp_path):
    options = OPTIONS | {"epochs": 3, "save_steps": 1}
    poison = range(2, 8)
    with poison_steps(*poison):
        train(make_config(rows, tmp_path / "whole", **options))
    with poison_steps(*poison), interrupt_training("dpo", after_steps=5):
        train(make_config(rows, tmp_path / "out", **options))
    with poison_steps(*poison):
        train(make_config(rows, tmp_path / "out", resume=True, **options))
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert_states_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "after_steps, save_steps, options",
    [
        (3, 1, {"ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5}),
        (3, 2, {"keep_best": True}),
        (0, 3, {"keep_best": True}),
    ],
)
def test_a_run_that_stopped_goes_on_as_if_it_had_skipped(rows, tmp_path, after_steps, save_steps, options):
    """From the checkpoint of the step before, of an earlier step, or from the beginning, without any."""
    options = options | OPTIONS | {"loss": "betadpo", "save_steps": save_steps, "eval_steps": 1}
    poison = after_steps + 1
    with poison_steps(poison):
        train(make_config(rows, tmp_path / "whole", **options))
        with pytest.raises(TrainingError, match=f"at step {poison} of dpo .* --resume --on-nan skip"):
            train(make_config(rows, tmp_path / "out", **(options | {"on_nan": "stop"})))
        train(make_config(rows, tmp_path / "out", resume=True, **options))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert_states_equal(one, other)
    expected, actual = (read_metrics(tmp_path / name) for name in ("whole", "out"))
    for record in actual[: actual.index(next(r for r in actual if r.get("num_skipped")))]:
        if record["part"] == "step":  # of the run that would have stopped, and counted nothing
            record.setdefault("num_skipped", 0)
    assert actual == expected


@pytest.mark.slow
@pytest.mark.parametrize("after_steps", [0, 4])
def test_ten_skipped_steps_in_a_row_stop_the_run(rows, tmp_path, capsys, after_steps):
    """Counted over a run that is resumed after some of them as well."""
    options = OPTIONS | {"epochs": 4, "save_steps": 1}
    poison = range(3, 30)
    with poison_steps(*poison):
        if after_steps:
            with interrupt_training("dpo", after_steps=2 + after_steps):
                train(make_config(rows, tmp_path / "out", **options))
            options["resume"] = True
        problem = "at step 12 of dpo it is nan, and 10 steps in a row are skipped for that: begin a new run"
        with pytest.raises(TrainingError, match=problem):
            train(make_config(rows, tmp_path / "out", **options))
    steps = [record["step"] for record in read_metrics(tmp_path / "out") if record["part"] == "step"]
    assert steps == list(range(1, 12))
    printed = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    assert len(printed) == 3 and printed[2].endswith(". Later ones are counted in metrics.jsonl alone.")


POISON_ONE_PROCESS = """
import math, sys
import torch
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.stages import DPOStage
from dpo_wrapper.training.train import train
from helpers.runs import SMALL_DECODER, make_config
torch.set_num_threads(1)
PRESETS["tiny"] = SMALL_DECODER
calls, micro_batch_loss = 0, DPOStage.micro_batch_loss

def poisoned_loss(self, module, batch):
    global calls
    calls += 1
    rank = torch.distributed.get_rank()
    loss, metrics = micro_batch_loss(self, module, batch)
    return loss * (math.nan if (rank, calls) == (1, 2) else 1.0), metrics

DPOStage.micro_batch_loss = poisoned_loss
options = {"sft_epochs": 0, "on_nan": "skip", "samples": 0, "exact_answers": 0, "save_steps": 0}
train(make_config(*sys.argv[1:], **options))
"""


@pytest.mark.slow
def test_processes_skip_the_same_steps(rows, tmp_path):
    """The loss of the second process alone is not finite."""
    (tmp_path / "script.py").write_text(POISON_ONE_PROCESS)
    run_in_two_processes(tmp_path / "script.py", rows, tmp_path / "two")
    with poison_steps(2):
        train(make_config(rows, tmp_path / "one", save_steps=0, **OPTIONS))
    one, two = (read_metrics(tmp_path / name, "grad_norm") for name in ("one", "two"))
    skipped = [record for record in two if record.get("num_skipped") == 1]
    assert skipped[0]["step"] == 2 and skipped[0]["loss"] is None
    for record in (*one, *two):
        if record["step"] == 2 and record["part"] == "step":
            assert record.pop("loss") is None
            record["loss"] = 0.0
    assert_metrics_close(one, two)


@pytest.fixture
def scaled_trainer(rows, tmp_path):
    """A trainer with the scaler of float16, which torch has for the CPU as well."""
    setup = set_up_training(make_config(rows, tmp_path / "out", **OPTIONS))
    (plan,) = setup.stages
    stage = create_stage(setup, plan, create_accelerator(setup.config))
    trackers = Trackers(setup.config, setup.run)
    trainer = Trainer(setup.config, setup.run, stage, plan.splits, setup.pretrained, trackers)
    trainer.start_watching(steps_done=0, first_step=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.accelerator.scaler, trainer.steps.optimizer = scaler, trainer.optimizer
    trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
    return trainer


@pytest.mark.parametrize(("value", "num_skipped"), [(math.nan, 1), (1e36, 0)])
def test_a_scaler_goes_on_after_a_skipped_step(scaled_trainer, value, num_skipped):
    """A loss that is not finite leaves the scale alone; one whose gradients overflow lowers it."""
    trainer, scaler = scaled_trainer, scaled_trainer.accelerator.scaler
    micro_batch_loss = trainer.stage.micro_batch_loss
    make_batches = trainer.micro_batch_maker(trainer.splits.train)
    trainer.train_step(1, make_batches(trainer.sampler[0]))
    before = copy_state(trainer)

    def poisoned_loss(module, batch):
        loss, metrics = micro_batch_loss(module, batch)
        return loss * value, metrics

    trainer.stage.micro_batch_loss = poisoned_loss
    metrics = trainer.train_step(2, make_batches(trainer.sampler[1]))
    assert not math.isfinite(metrics["grad_norm"])
    assert metrics["num_skipped"] == num_skipped
    assert_states_equal(before, copy_state(trainer))
    assert scaler.get_scale() == (2.0**10 if num_skipped else 2.0**9)
    trainer.stage.micro_batch_loss = micro_batch_loss
    metrics = trainer.train_step(3, make_batches(trainer.sampler[2]))
    assert math.isfinite(metrics["grad_norm"]) and metrics["num_skipped"] == num_skipped
    after = copy_state(trainer)
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def make_steps(on_nan):
    printed = []
    steps = NonFiniteSteps(on_nan, "dpo", lambda step: [f"row {k}" for k in range(step)], printed.append)
    return steps, printed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_by_default(value):
    steps, printed = make_steps("stop")
    assert not steps.is_skipped(1, {"loss": 1.0, "norm of the gradients": 1e30})
    with pytest.raises(TrainingError) as error:
        steps.is_skipped(5, {"loss": 1.0, "norm of the gradients": value})
    assert str(error.value) == (
        f"the norm of the gradients should be finite, but at step 5 of dpo it is {value}: begin a new run "
        "with a lower learning rate or --max-grad-norm, look at the rows of this step (row 0; row 1; row 2 "
        "and 2 others), or go on from the last checkpoint, which is whole, by --resume --on-nan skip."
    )
    assert not printed


def test_a_finite_step_begins_the_count_of_a_row_anew():
    steps, printed = make_steps("skip")
    for step in range(1, 40):
        is_wrong = step % 10 != 0
        assert steps.is_skipped(step, {"loss": math.nan if is_wrong else 0.5}) == is_wrong
    assert steps.num_skipped == 36 and steps.num_in_a_row == 9 and len(printed) == 3
    record = {"stage": "dpo", "part": "step"}
    again, _ = make_steps("skip")
    numbers = [0, 1, 2, 2, 3]
    again.read_records([record | {"num_skipped": n} for n in numbers] + [{"stage": "dpo", "part": "eval"}])
    assert (again.num_skipped, again.num_in_a_row) == (3, 1)


def test_a_few_rows_are_named():
    assert describe_rows(["a", "b"]) == "a; b"
    assert describe_rows(["a", "b", "c", "d"]) == "a; b; c and 1 other"
