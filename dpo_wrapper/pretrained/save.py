"""Save a model with its tokenizer, in a form that the model's own library can load."""

import json
from pathlib import Path

from torch import nn

from dpo_wrapper.libraries.tensor_files import apply_umask
from dpo_wrapper.pretrained.adapter import save_adapter
from dpo_wrapper.pretrained.model import CONFIG_FILE, WEIGHTS_FILE, PretrainedModel
from dpo_wrapper.pretrained.rescaling import undo_rescaling


def save_pretrained(pretrained: PretrainedModel, model: nn.Module, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer; `load_pretrained(folder)` loads them again.

    The weights of an x-transformers decoder keep its names and their dtype, and its arguments stand in
    config.json under "x_transformers". A Hugging Face model is saved by its own `save_pretrained`. Of a model
    with an adapter that trains the adapter alone is saved, in PEFT's format. Of `pretrained` only the
    tokenizer, the kind of the model and the origin of its adapter are used.
    """
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    undo_rescaling(model)
    if pretrained.adapter is not None:
        save_adapter(model, pretrained.adapter, folder)
    elif pretrained.decoder_args is not None:
        save_model(model, str(folder / WEIGHTS_FILE))
        settings = {
            "x_transformers": pretrained.decoder_args,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "tokenizer": "bytes" if pretrained.tokenizer_name == "bytes" else ".",
        }
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    else:
        model.save_pretrained(folder)  # type: ignore[operator]
    pretrained.tokenizer.save(folder)
    for file in folder.glob("*.safetensors"):
        apply_umask(file)
