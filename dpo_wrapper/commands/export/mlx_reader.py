"""Models and adapters as mlx-lm reads them."""

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dpo_wrapper.commands.export.agreement import ExportError, Logits, UnreadableError
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Check
from dpo_wrapper.commands.export.rope_keys import GENERATION_FILE, LONG_ROPE, read_config
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.tokens.tokenizers import ByteTokenizer
from dpo_wrapper.libraries.error_text import summarize_error
from dpo_wrapper.pretrained.model import CONFIG_FILE

ROUNDED, ROUNDED_TOLERANCE = ("gemma", "gemma3", "gemma3_text"), 2e-3
"""Architectures that mlx-lm computes less exactly than in float32: Gemma with another approximation of GELU,
Gemma 3 with the scale of embeddings in bfloat16. The tolerance is one rounding to bfloat16."""


class MlxReader:
    """A model in mlx-lm, cast to float32.

    Args:
        model: folder in Hugging Face's format.
        adapter: folder of an adapter in mlx-lm's format.
        is_chat: whether it reads texts that a chat template wrote; other texts are not tried.

    Raises:
        UnreadableError: mlx-lm cannot load the model.
        ExportError: it cannot load the adapter on it.
    """

    name = "mlx-lm"

    def __init__(self, model: Path, adapter: Path | None = None, *, is_chat: bool = False) -> None:
        import mlx.core as mx
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model, load_tokenizer

        try:
            self.model: Any = load_model(model)[0]
            self.tokenizer: Any = load_tokenizer(model) if is_chat else None
            if adapter is not None:
                load_adapters(self.model, str(adapter))
        except Exception as error:  # of whichever kind: mlx-lm checks little of what it loads
            reason = summarize_error(error)
            if adapter is None:
                raise UnreadableError(f"mlx-lm cannot read it: {reason}.") from error
            raise ExportError(
                f"mlx-lm should load the export, but it does not ({reason}): do not use it."
            ) from error
        self.model.set_dtype(mx.float32)
        self.model.eval()

    def compute_logits(self, ids: Sequence[int]) -> Logits:
        import mlx.core as mx

        return np.array(self.model(mx.array([list(ids)]))[0].astype(mx.float32))

    def tokenize(self, text: str) -> list[int] | None:
        """As `mlx_lm.generate` does it with a dialogue."""
        return None if self.tokenizer is None else self.tokenizer.encode(text, add_special_tokens=False)

    def close(self) -> None:
        self.model = None


def make_mlx_check(source: ExportSource, model: Path, tolerance: float, adapter: Path | None = None) -> Check:
    """mlx-lm with a model and an adapter on it, or a sentence on why it cannot read them."""
    if not has_mlx():
        remedy = "pip install mlx-lm, and without an Apple GPU 'mlx[cpu]'"
        return Check(None, tolerance, f"mlx-lm has not read it, for it is missing: {remedy}.")
    if (reason := find_mlx_gap(model)) is not None:
        return Check(None, tolerance, f"mlx-lm cannot read it: {reason}.")
    if read_config(model / CONFIG_FILE)["model_type"] in ROUNDED:
        tolerance = max(tolerance, ROUNDED_TOLERANCE)
    return Check(lambda: MlxReader(model, adapter, is_chat=source.is_chat), tolerance)


def list_commands(
    source: ExportSource,
    config: ExportConfig,
    model: Path,
    *,
    name: str | None = None,
    adapter: Path | None = None,
) -> list[str]:
    """The command by which mlx-lm answers the first prompt; none for a model that it cannot read.

    Args:
        model: the folder that it reads.
        name: how it is named in the command, by default by the folder.
        adapter: as for `MlxReader`.
    """
    if find_mlx_gap(model) is not None or isinstance(source.tokenizer, ByteTokenizer):
        return []
    words = ["mlx_lm.generate", "--model", name or str(model)]
    words += [] if adapter is None else ["--adapter-path", str(adapter)]
    end_id = source.tokenizer.end_of_turn_id
    if source.is_chat and end_id not in {source.tokenizer.eos_id, *list_end_ids(model)}:
        words += ["--extra-eos-token", source.tokenizer.decode([end_id], skip_special_tokens=False)]
    if source.tokenizer.has_chat_template and not source.is_chat:
        words.append("--ignore-chat-template")
    return [shlex.join([*words, "--prompt", config.prompts[0]])]


def list_end_ids(folder: Path) -> list[int]:
    """The tokens at which a model's own configuration ends a text, beside that of its tokenizer."""
    file = folder / GENERATION_FILE
    settings = read_config(folder / CONFIG_FILE) | (read_config(file) if file.is_file() else {})
    ids = settings.get("eos_token_id")
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def has_mlx() -> bool:
    return find_spec("mlx_lm") is not None and find_spec("mlx") is not None


def find_mlx_gap(folder: Path) -> str | None:
    """Why mlx-lm cannot compute a model in a folder, as a part of a sentence; None if it can.

    Where mlx-lm is missing, only what is known without it is said.
    """
    settings = read_config(folder / CONFIG_FILE)
    if not any(folder.glob("model*.safetensors")):
        return f"{folder} holds no model*.safetensors"
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in LONG_ROPE:
        return "its positions (longrope) are those of long texts there, whatever the length"
    if not has_mlx():
        return None
    from mlx_lm.utils import MODEL_REMAPPING

    kind = settings["model_type"]
    if find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}") is None:
        return f"it does not know the architecture {kind}"
    return None
