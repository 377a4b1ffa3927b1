"""Options of the model that is trained."""

from dataclasses import dataclass

from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.options.base import Options


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model is trained, and how it is loaded and run."""

    model: str = "tiny"
    """tiny, small or medium (a new x-transformers decoder), a run folder, the folder of an adapter, or a
    Hugging Face model by folder or name."""

    @property
    def is_new_model(self) -> bool:
        return self.model in PRESETS
