"""The model card of a run: README.md with metadata that the Hugging Face Hub reads."""

import json
from collections.abc import Sequence
from pathlib import Path

from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.evaluation.report import Record, format_before_and_after
from dpo_wrapper.losses import CombinedLoss, parse_losses
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.setup import TrainSetup
from dpo_wrapper.version import __version__

LOAD_HUGGING_FACE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""

LOAD_DECODER = """from dpo_wrapper.pretrained import load_pretrained

pretrained = load_pretrained("{name}", None, {max_length})
model, tokenizer = pretrained.model, pretrained.tokenizer"""


def write_model_card(setup: TrainSetup, records: Sequence[Record]) -> None:
    """Write README.md to the run folder; `records` are the lines of its log."""
    write_whole(setup.run.path / "README.md", format_model_card(setup, records))


def format_model_card(setup: TrainSetup, records: Sequence[Record]) -> str:
    """The card: metadata, what the model was trained on and how, metrics, and how to load it."""
    config, plan = setup.config, setup.stages[-1]
    name = setup.run.path.absolute().name
    is_decoder = setup.pretrained.decoder_args is not None
    load = LOAD_DECODER if is_decoder else LOAD_HUGGING_FACE
    sections = [
        format_metadata(config, is_decoder, has_preferences=plan.name == "dpo"),
        f"# {name}",
        f"{describe_base(config)}, trained with dpo-wrapper {__version__}.",
        *format_stages(setup),
        *([describe_loss(config)] if plan.name == "dpo" else []),
        f"## Metrics of {plan.name}",
        "```\n" + format_before_and_after([one for one in records if one["stage"] == plan.name]) + "\n```",
        "## Use",
        f"```python\n{load.format(name=name, max_length=config.max_length)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def format_metadata(config: TrainConfig, is_decoder: bool, has_preferences: bool) -> str:
    """YAML for the Hub: names that are known there, no paths of this machine."""
    lines = [f"library_name: {'x-transformers' if is_decoder else 'transformers'}"]
    if not config.is_new_model and not Path(config.model).exists():
        lines.append(f"base_model: {json.dumps(config.model)}")
    lines.append("pipeline_tag: text-generation")
    datasets = [str(path) for path in config.data if not path.exists() and str(path).count("/") == 1]
    if datasets:
        lines += ["datasets:", *(f"- {json.dumps(one)}" for one in datasets)]
    lines += ["tags:", "- dpo-wrapper", *(["- dpo"] if has_preferences else [])]
    return "\n".join(["---", *lines, "---"])


def describe_base(config: TrainConfig) -> str:
    if config.is_new_model:
        return f"A new decoder of size {config.model}"
    path = Path(config.model)
    return f"`{path.absolute().name if path.exists() else config.model}`"


def format_stages(setup: TrainSetup) -> list[str]:
    """A table of the stages, and the names of the data."""
    rows = [
        "| stage | trained on | evaluated on | epochs | peak learning rate |",
        "| --- | --- | --- | --- | --- |",
    ]
    for plan in setup.stages:
        counts = [f"{len(part):,} {plan.splits.unit}" for part in (plan.splits.train, plan.splits.eval)]
        rows.append(f"| {plan.name} | {' | '.join(counts)} | {plan.epochs} | {plan.learning_rate:g} |")
    files = ", ".join(f"`{path.name if path.exists() else path}`" for path in setup.config.data)
    return [f"Data: {files}; {setup.config.batch_size} examples a step.", "\n".join(rows)]


def describe_loss(config: TrainConfig) -> str:
    """The loss and its reference, in words."""
    has_reference = config.reference != "none" and CombinedLoss(parse_losses(config.loss)).needs_reference
    reference = "the model as it was before preference training" if has_reference else "none"
    if config.ref_model_sync_steps:
        reference += f", moved towards the policy every {config.ref_model_sync_steps} steps"
    return f"Loss: `{config.loss}`; reference: {reference}."
