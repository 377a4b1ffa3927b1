"""The model card of a run: README.md with metadata that the Hugging Face Hub reads."""

import json
from collections.abc import Sequence
from pathlib import Path

from dpo_wrapper.data.whole_files import write_whole
from dpo_wrapper.evaluation.report import Record, format_before_and_after
from dpo_wrapper.pretrained import PretrainedModel
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.run_summary import (
    describe_base,
    format_loading,
    hide_paths,
    list_stages,
    name_data,
)
from dpo_wrapper.training.setup import TrainSetup
from dpo_wrapper.version import __version__


def write_model_card(setup: TrainSetup, records: Sequence[Record]) -> None:
    """Write README.md to the run folder; `records` are the lines of its log."""
    write_whole(setup.run.path / "README.md", format_model_card(setup, records))


def format_model_card(setup: TrainSetup, records: Sequence[Record]) -> str:
    """The card: metadata, what the model was trained on and how, metrics, and how to load it."""
    config, plan, pretrained = setup.config, setup.stages[-1], setup.pretrained
    name, reference = setup.run.path.absolute().name, setup.run.record.reference or ""
    has_preferences = plan.name == "dpo"
    sections = [
        format_metadata(config, pretrained, has_preferences),
        f"# {name}",
        f"{describe_base(config)}, trained with dpo-wrapper {__version__}.",
        *format_stages(setup),
        *([f"Loss: `{config.loss}`; {hide_paths(reference)}"] if has_preferences else []),
        f"## Metrics of {plan.name}",
        "```\n" + format_before_and_after([one for one in records if one["stage"] == plan.name]) + "\n```",
        f"`{setup.run.page_file.name}` has curves and samples.",
        "## Use",
        f"```python\n{format_loading(pretrained, name, config.max_length)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def format_metadata(config: TrainConfig, pretrained: PretrainedModel, has_preferences: bool) -> str:
    """YAML for the Hub: names that are known there, no paths of this machine."""
    library = "transformers" if pretrained.decoder_args is None else "x-transformers"
    base, is_adapter = config.model, pretrained.adapter is not None
    if pretrained.adapter is not None:
        library, base = "peft", pretrained.adapter.base
    lines = [f"library_name: {library}"]
    if not config.is_new_model and not Path(base).exists():
        lines.append(f"base_model: {json.dumps(base)}")
    lines.append("pipeline_tag: text-generation")
    datasets = [str(path) for path in config.data if not path.exists() and str(path).count("/") == 1]
    if datasets:
        lines += ["datasets:", *(f"- {json.dumps(one)}" for one in datasets)]
    tags = ["dpo-wrapper", *(["dpo"] if has_preferences else []), *(["lora"] if is_adapter else [])]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---"])


def format_stages(setup: TrainSetup) -> list[str]:
    """A table of the stages, and the names of the data."""
    head, lines = list_stages(setup)
    rows = [head, ["---"] * len(head), *lines]
    files = ", ".join(f"`{name}`" for name in name_data(setup.config))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return [f"Data: {files}; {setup.config.batch_size} examples a step.", table]
