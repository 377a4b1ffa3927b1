"""Models of transformers in GGUF files."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.pretrained.gguf_adapter import open_gguf, read_tensor


def find_gguf(folder: str | Path) -> Path | None:
    """The GGUF file that is the only model in a folder with a config.json, if there is one."""
    files = list(Path(folder).glob("*.gguf"))
    has_weights = any(Path(folder).glob("*.safetensors")) or any(Path(folder).glob("*.bin"))
    return files[0] if len(files) == 1 and not has_weights else None


def load_gguf(file: Path, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """The model in a GGUF file; its settings are those of `config`.

    transformers reads it, but for what it does not know (Gemma 1).
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if config.model_type == "mistral":  # llama.cpp's name for both is llama
        config = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    if config.model_type == "gemma":
        return load_gemma(file, config, dtype, **options)
    with hide_bar():
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=dtype, **options
        )


@contextmanager
def hide_bar() -> Iterator[None]:
    """Keep a progress bar that transformers cannot switch off out of a file or a pipe."""
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(StringIO()):
            yield


def load_gemma(file: Path, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    """A Gemma, to whose norms 1 is added in the file."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    names = get_tensor_name_map(MODEL_ARCH.GEMMA, config.num_hidden_layers)
    tensors = {tensor.name: read_tensor(tensor) for tensor in open_gguf(file).tensors}
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        tensor = tensors[gguf_name or name]
        state[name] = tensor - 1 if name.endswith("norm.weight") else tensor
    model.load_state_dict(state, strict=False)
    return model.eval()
