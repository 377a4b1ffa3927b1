"""The base of an adapter as mlx-lm reads it, and written anew where it would be misread."""

from pathlib import Path

from dpo_wrapper.commands.export.rope_keys import (
    GENERATION_FILE,
    lacks_rope_keys,
    read_config,
    repeat_rope_keys,
)
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.rows.messages import Message
from dpo_wrapper.data.tokens.tokenizers import has_tokenizer, load_tokenizer
from dpo_wrapper.pretrained.hugging_face import find_model
from dpo_wrapper.pretrained.model import CONFIG_FILE


def find_folder(base: str) -> Path:
    """Where the files of a base are, for a name on the hub in its cache."""
    folder = find_model(base)
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "model*.safetensors"]
    return Path(snapshot_download(folder, local_files_only=True, allow_patterns=patterns))


def find_misreading(source: ExportSource, base: Path) -> str | None:
    """What mlx-lm would read otherwise in the folder of a base, as a part of a sentence; None if nothing."""
    if lacks_rope_keys(read_config(base / CONFIG_FILE)):
        return "whose config.json says its rotary positions where transformers 5 alone looks"
    if source.is_chat and not has_tokenizer_of(source, base):
        return "whose tokenizer writes prompts otherwise than in training"
    return None


def has_tokenizer_of(source: ExportSource, base: Path) -> bool:
    """Whether a folder's own tokenizer writes the turns of prompts as the model has learned them."""
    if not has_tokenizer(base):
        return False
    tokenizer = load_tokenizer(base)
    return tokenizer.has_chat_template and all(
        tuple(tokenizer.encode_prompt((Message("user", one.prompt),))) == one.prompt_ids
        for one in source.outputs
    )


def link_base(source: ExportSource, base: Path, folder: Path) -> Path:
    """A folder of links to the weights of a base, with the model's tokenizer and a config.json for mlx-lm."""
    folder.mkdir()
    for file in [*base.glob("model*.safetensors*"), *base.glob(GENERATION_FILE)]:
        (folder / file.name).symlink_to(file.resolve())
    (folder / CONFIG_FILE).write_bytes((base / CONFIG_FILE).read_bytes())
    repeat_rope_keys(folder / CONFIG_FILE)
    source.tokenizer.save(folder)
    return folder
