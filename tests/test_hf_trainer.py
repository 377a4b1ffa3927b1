"""examples/hf_trainer.py: what transformers' Trainer saves, resumes, accumulates, evaluates and logs."""

from functools import partial

import pytest
import torch

from dpo_wrapper.data import collate_preference
from helpers.examples import load_example, preference_trainer
from helpers.runs import run_in_two_processes

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("accelerate")

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


class StopAt(transformers.TrainerCallback):  # type: ignore[name-defined]
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def logged_steps(trainer):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in trainer.state.log_history]


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tied", "lora"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, lora):
    make = partial(preference_trainer, lora=lora, max_steps=2, per_device_train_batch_size=4, save_steps=1)
    whole = make(tmp_path / "whole")
    initial = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    make(tmp_path / "parts", callbacks=[StopAt(1)]).train()
    assert not (tmp_path / "parts" / "checkpoint-2").exists()
    resumed = make(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    parameters = dict(resumed.model.named_parameters())
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, parameters[name]), name
    assert any(not torch.equal(value, parameters[name]) for name, value in initial.items())
    assert logged_steps(resumed) == logged_steps(whole)
    check_checkpoint(tmp_path / "parts" / "checkpoint-2", resumed.dpo.policy_model, lora)


def check_checkpoint(folder, policy, lora):
    """It is the adapter alone, or else the policy with its tied weights once, and no reference."""
    (file,) = folder.glob("*.safetensors")
    if lora:
        assert file.name == "adapter_model.safetensors"
        return
    assert safetensors.load_file(file).keys() == {name for name, _ in policy.named_parameters()}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), loaded.parameters(), strict=True))


def test_accumulation_is_exact_where_micro_batches_differ(tmp_path):
    # 11 rows are a step of 8 and one of 3: with micro-batches of 2 the latter has 2 and 1
    def train(batch_size, accumulation):
        trainer = preference_trainer(
            tmp_path / str(batch_size),
            num_rows=11,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
        )
        trainer.train()
        assert trainer.state.global_step == 2
        return trainer

    whole, split = train(8, 1), train(2, 4)
    for (name, p), q in zip(whole.model.named_parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6, msg=name)
    for one, other in zip(whole.state.log_history[:2], split.state.log_history[:2], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert other["pairs/valid"] == one["pairs/valid"]


def test_the_log_has_the_metrics_of_training_and_evaluation(tmp_path):
    trainer = preference_trainer(
        tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2
    )
    before = trainer.evaluate()
    trainer.train()
    with torch.no_grad():
        _, expected = trainer.dpo(collate_preference(list(trainer.eval_dataset)), return_metrics=True)
    steps = [line for line in trainer.state.log_history if "loss" in line]
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert [line["step"] for line in evaluations] == [1, 2]
    assert before["eval_loss"] != evaluations[0]["eval_loss"]
    assert {name.removeprefix("eval_") for name in before} >= expected.keys() & steps[0].keys()
    for name, value in expected.items():
        if not name.startswith("tokens/"):  # these depend on the batches
            assert evaluations[-1][f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    arguments = "max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2"
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from helpers.examples import preference_trainer\n"
        "torch.set_num_threads(1)\n"
        f"trainer = preference_trainer(sys.argv[1], {arguments}, gradient_accumulation_steps=2)\n"
        "assert trainer.accelerator.num_processes == 2\n"
        "trainer.train()\n"
    )
    run_in_two_processes(script, tmp_path / "two")
    one = preference_trainer(
        tmp_path / "one",
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    one.train()
    saved = safetensors.load_file(tmp_path / "two" / "checkpoint-3" / "model.safetensors")
    for name, p in one.model.named_parameters():
        torch.testing.assert_close(saved[name], p.detach(), rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_example_as_it_is(tmp_path):
    main = load_example("hf_trainer").main
    main(out=tmp_path, steps=20)
    trainer = main(out=tmp_path, steps=40, resume=True)
    assert trainer.state.global_step == 40 and trainer.state.log_history[0]["step"] == 5
    assert trainer.evaluate()["eval_rewards/accuracies"] >= 0.75
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings
