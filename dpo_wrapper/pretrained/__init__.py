"""Load and save a model with its tokenizer, in a form that the model's own library can load."""

from dpo_wrapper.pretrained.adapter import AdapterOrigin
from dpo_wrapper.pretrained.decoder import PRESETS
from dpo_wrapper.pretrained.decoder_file import is_decoder_file
from dpo_wrapper.pretrained.load import load_pretrained
from dpo_wrapper.pretrained.model import RUN_FILE, PretrainedModel, read_run
from dpo_wrapper.pretrained.rescaling import rescales_in_eval_mode, undo_rescaling
from dpo_wrapper.pretrained.save import save_pretrained

__all__ = [
    "PRESETS",
    "RUN_FILE",
    "AdapterOrigin",
    "PretrainedModel",
    "is_decoder_file",
    "load_pretrained",
    "read_run",
    "rescales_in_eval_mode",
    "save_pretrained",
    "undo_rescaling",
]
