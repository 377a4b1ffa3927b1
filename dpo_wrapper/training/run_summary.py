"""What a run was, in words that its model card and its page have in common: no paths of this machine."""

import re
from pathlib import Path

from dpo_wrapper.pretrained import PretrainedModel
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.monitoring.report_line import count_examples
from dpo_wrapper.training.setup import TrainSetup

LOAD_HUGGING_FACE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""

LOAD_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""

LOAD_DECODER = """from dpo_wrapper.pretrained import load_pretrained

pretrained = load_pretrained("{name}", None, {max_length})
model, tokenizer = pretrained.model, pretrained.tokenizer"""


def format_loading(pretrained: PretrainedModel, name: str, max_length: int) -> str:
    """Lines of Python that load what a run has trained from the folder of its name."""
    load = LOAD_HUGGING_FACE if pretrained.adapter is None else LOAD_ADAPTER
    if pretrained.decoder_args is not None:
        load = LOAD_DECODER
    return load.format(name=name, max_length=max_length)


def describe_base(config: TrainConfig) -> str:
    if config.is_new_model:
        return f"A new decoder ({hide_paths(config.model)})"
    return f"`{hide_paths(config.model)}`"


def hide_paths(text: str) -> str:
    """The text with names in place of the paths of this machine."""
    for word in re.findall(r"[^\s(),;]+", text):
        path = word.rstrip(".")
        if "/" in path and Path(path).exists():
            text = text.replace(path, Path(path).name)
    return text


def name_data(config: TrainConfig) -> list[str]:
    """The files of a run by their names, and data sets of the hub by theirs."""
    return [path.name if path.exists() else str(path) for path in config.data]


def list_stages(setup: TrainSetup) -> tuple[list[str], list[list[str]]]:
    """Headings of a table of the stages, and its rows."""
    head = ["stage", "trained on", "evaluated on", "steps", "peak learning rate"]
    rows = []
    for plan in setup.stages:
        splits = plan.splits
        counts = [count_examples(len(part), splits.unit) for part in (splits.train, splits.eval)]
        rows.append([plan.name, *counts, f"{plan.num_steps:,}", f"{plan.learning_rate:.2g}"])
    return head, rows
