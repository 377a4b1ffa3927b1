"""Load and save a model with its tokenizer, in a form that the model's own library can load."""

from dpo_wrapper.pretrained.adapter import (
    ADAPTER_CONFIG,
    AdapterOrigin,
    absolute_name,
    find_base,
    import_peft,
    is_adapter_folder,
    load_adapter,
    load_converted_adapter,
    merge_adapter,
    own_tokenizer,
    remember_initial_factors,
)
from dpo_wrapper.pretrained.decoder import PRESETS
from dpo_wrapper.pretrained.load import load_pretrained
from dpo_wrapper.pretrained.model import RUN_FILE, PretrainedModel, read_run
from dpo_wrapper.pretrained.rescaling import rescales_in_eval_mode, undo_rescaling
from dpo_wrapper.pretrained.save import save_pretrained

__all__ = [
    "ADAPTER_CONFIG",
    "PRESETS",
    "RUN_FILE",
    "AdapterOrigin",
    "PretrainedModel",
    "absolute_name",
    "find_base",
    "import_peft",
    "is_adapter_folder",
    "load_adapter",
    "load_converted_adapter",
    "load_pretrained",
    "merge_adapter",
    "own_tokenizer",
    "read_run",
    "remember_initial_factors",
    "rescales_in_eval_mode",
    "save_pretrained",
    "undo_rescaling",
]
