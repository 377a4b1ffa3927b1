"""Every option of a run changes something, shown by two runs of a tiny model that differ in it alone."""

import re
from typing import Any

import pytest

from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.config import TrainConfig
from helpers.option_effects import Workshop
from helpers.runs import ROOT, SMALL_DECODER

LLAMA = {"model": "llama"}
LORA = LLAMA | {"lora": True}
CHAT = {"tokenizer": "chat"}
SGD = {"optimizer": "torch.optim.SGD"}
ALL_DEFAULTS = {"sft_epochs": None, "epochs": 3, "learning_rate": None, "exact_answers": 100}
PRETRAIN = {"stage": ("pretrain", "dpo"), "sft_epochs": None}
UPHILL = SGD | {"optimizer_args": '{"maximize": true}', "eval_steps": 1, "epochs": 3}
"""The loss rises from step to step, so that the first evaluation is the best."""

EFFECTS: list[tuple[str, Any, str, dict[str, Any]]] = [
    # option, another value, what it changes, and the other options that both runs have
    ("data", "swapped.jsonl", "setup", {}),
    ("columns", ("chosen=rejected", "rejected=chosen"), "setup", {}),
    ("kind", "prompt_completion", "setup", ALL_DEFAULTS),
    ("score", "assistant", "setup", {"data": "dialogues.jsonl"}),
    ("as_chat", "never", "setup", CHAT),
    ("chat_template", "template.jinja", "setup", CHAT),
    ("chat_template_kwargs", '{"greeting": "Hi"}', "setup", CHAT | {"chat_template": "template.jinja"}),
    ("allow_empty", True, "refusal", {"data": "empty.jsonl"}),
    ("on_bad_row", "skip", "refusal", {"data": "broken.jsonl"}),
    ("tokenizer", "chat", "setup", {}),
    ("max_length", 12, "setup", {}),
    ("max_prompt_length", 3, "setup", {}),
    ("on_long", "drop", "setup", {"max_length": 24}),
    ("eval_data", "swapped.jsonl", "setup", {}),
    ("eval_fraction", 0.5, "setup", {}),
    ("ranking", "best", "setup", {"data": "lists.jsonl"}),
    ("model", "llama", "setup", {}),
    ("dtype", "bfloat16", "setup", {}),
    ("attn_implementation", "eager", "setup", LLAMA),
    ("share_prefix", "never", "lines", {}),
    ("gradient_checkpointing", True, "setup", LLAMA),
    ("freeze", ("attn",), "setup", LLAMA),
    ("lora", True, "setup", LLAMA),
    ("adapter", "adapter", "setup", {}),
    ("lora_r", 2, "setup", LORA),
    ("lora_alpha", 100.0, "log", LORA),
    ("lora_dropout", 0.5, "log", LORA),
    ("lora_targets", ("q_proj",), "setup", LORA),
    ("lora_layers", "0", "setup", LORA),
    ("lora_init", "gaussian", "setup", LORA),
    ("use_dora", True, "setup", LORA),
    ("use_rslora", True, "log", LORA | {"lora_alpha": 1.0}),
    ("loss", "hinge", "log", {}),
    ("reference", "none", "log", {"loss": "cpo", "reference": "copy"}),
    ("reference_dtype", "bfloat16", "log", {}),
    ("precompute_ref_log_probs", True, "files", {}),
    ("ref_model_sync_steps", 1, "log", {}),
    ("ref_model_mixup_alpha", 1.0, "log", {"ref_model_sync_steps": 1}),
    ("ld_alpha", 0.0, "log", {}),
    ("wpo", True, "log", {"loss": "sigmoid"}),
    ("router_aux_loss_coef", 1.0, "weights", {"model": "mixture", "tokenizer": "bytes", "max_length": 48}),
    ("stage", ("sft", "dpo"), "setup", {"sft_epochs": None, "model": "llama"}),
    ("pretrain_epochs", 2, "setup", PRETRAIN),
    ("pretrain_learning_rate", 1e-3, "setup", PRETRAIN),
    ("sft_epochs", 2, "setup", {}),
    ("sft_learning_rate", 1e-4, "setup", {"sft_epochs": 1}),
    ("train_on_prompt", False, "setup", {"sft_epochs": 1}),
    ("epochs", 2, "log", {}),
    ("learning_rate", 1e-3, "log", {}),
    ("batch_size", 2, "log", {}),
    ("micro_batch_tokens", 24, "log", {}),
    ("max_steps", 1, "log", {}),
    ("optimizer", "torch.optim.SGD", "weights", {}),
    ("optimizer_args", '{"betas": [0.5, 0.5]}', "weights", {}),
    ("lr_scheduler", "linear", "log", {"batch_size": 1}),
    ("lr_scheduler_args", '{"min_lr_rate": 0.5}', "log", {
        "batch_size": 1, "lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": '{"min_lr_rate": 0.1}'}),
    ("warmup_ratio", 0.9, "log", {}),
    ("weight_decay", 0.9, "weights", {}),
    ("max_grad_norm", 1e-3, "weights", SGD),
    ("precision", "bf16", "log", {}),
    ("seed", 1, "setup", {}),
    ("split_seed", 1, "setup", {"eval_fraction": 0.5}),
    ("logging_steps", 3, "lines", {"batch_size": 2}),
    ("eval_steps", 1, "log", {}),
    ("save_steps", 1, "lines", {}),
    ("sample_steps", 1, "samples", {"samples": 1}),
    ("samples", 2, "samples", {}),
    ("exact_answers", 2, "log", {}),
    ("best_metric", "max:loss", "log", UPHILL | {"keep_best": True}),
    ("early_stopping_patience", 1, "log", UPHILL),
    ("keep_best", True, "weights", UPHILL),
]  # fmt: skip

NOT_SHOWN = {
    "split": "it takes a data set that `datasets` has saved: tests/data/test_files.py",
    "num_workers": "the result is the same, by design: tests/training/test_trainer.py",
    "torch_compile": "it takes a compiler: tests/training/test_model_options.py",
    "load_in_4bit": "it takes CUDA: tests/training/test_lora_options.py",
    "reference_device": "it takes a second device: tests/gpu/test_references.py",
    "cpu": "it takes an accelerator",
    "fsdp": "it takes several processes: tests/training/test_sharded.py",
    "on_nan": "it takes a loss that is not finite: tests/training/test_non_finite.py",
    "out": "every run here has its own",
    "report_to": "it takes other programs: tests/training/monitoring/test_trackers.py",
    "project": "it takes other programs: tests/training/monitoring/test_trackers.py",
    "resume": "it takes an interrupted run: tests/training/test_resume.py",
    "save_total_limit": "checkpoints are gone in the end: tests/training/test_resume.py",
}
"""Options that two short runs on a CPU cannot tell apart, and why."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        yield Workshop(tmp_path_factory.mktemp("workshop"))


def test_every_option_is_in_one_of_the_tables():
    named = [*(option for option, *_ in EFFECTS), *NOT_SHOWN]
    assert len(set(named)) == len(named)
    assert set(named) ^ set(TrainConfig.__dataclass_fields__) == set()


@pytest.mark.parametrize("option", NOT_SHOWN)
def test_what_is_not_shown_here_is_named_where_it_is(option):
    for name in re.findall(r"tests/\S+", NOT_SHOWN[option]):
        assert re.search(rf"\b{option}\b", (ROOT / name).read_text(encoding="utf-8")), name


@pytest.mark.slow
def test_equal_options_have_equal_effects(workshop):
    for part, options in (("setup", LORA), ("log", {}), ("weights", {}), ("lines", {})):
        first = workshop.measure(part, options)
        workshop.describe_setup.cache_clear()
        workshop.describe_run.cache_clear()
        assert workshop.measure(part, options) == first


@pytest.mark.slow
@pytest.mark.parametrize(("option", "value", "part", "others"), EFFECTS, ids=[row[0] for row in EFFECTS])
def test_an_option_changes_a_run(workshop, option, value, part, others):
    before, after = (workshop.measure(part, options) for options in (others, others | {option: value}))
    assert before != after
    assert part != "refusal" or after is None
