"""What a training run began from: the natural reference of its model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_wrapper.pretrained import PRESETS, AdapterOrigin, is_decoder_file

STAGES_BEFORE = ("sft", "pretrain")
"""Folders of a run that hold the model as it was after a stage, the latest stage first."""


@dataclass(frozen=True)
class RunStart:
    """The model that a run began its last stage from.

    Attributes:
        description: in words, as a part of a sentence.
        name: folder or name of the model; None where none has to be loaded, or none is kept.
        adapter: folder of the adapter on it, where the run continued one.
        is_policy_without_adapter: whether it is the run's own model with its adapter switched off.
    """

    description: str
    name: str | None = None
    adapter: str | None = None
    is_policy_without_adapter: bool = False


def find_run_start(folder: Path, settings: Mapping[str, Any], origin: AdapterOrigin | None) -> RunStart:
    """What the run in a folder began its last stage from.

    Args:
        folder: of the run.
        settings: the run's options, as run.json has them.
        origin: of the adapter that the folder holds; None where it holds a whole model.
    """
    model, adapter = settings["model"], settings.get("adapter")
    for stage in STAGES_BEFORE:
        if (folder / stage).is_dir():
            stage_folder = str(folder / stage)
            return RunStart(f"the model as it was after {stage} ({stage_folder})", stage_folder)
    if adapter is not None:
        return RunStart(f"{model} with the adapter as it was loaded from {adapter}", model, adapter)
    if origin is not None:
        words = f"{origin.base_in_words} with the adapter switched off"
        return RunStart(words, is_policy_without_adapter=True)
    if is_new_model(model):
        return RunStart(f"none, for {folder} began as a new model, which is not kept")
    return RunStart(f"{model}, from which the run began", model)


def is_new_model(name: str) -> bool:
    """Whether a name stands for a new model with random weights."""
    return name in PRESETS or is_decoder_file(name)
