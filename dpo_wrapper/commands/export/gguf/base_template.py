"""The chat template in the GGUF file of a base, which is not always that of the training."""

from pathlib import Path

from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.rows.messages import Message
from dpo_wrapper.data.tokens.chat_template import ChatTemplate
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from dpo_wrapper.pretrained.gguf_adapter import open_gguf, read_field

TEMPLATE_FILE = "chat_template.jinja"


def writes_otherwise(file: Path, source: ExportSource) -> bool:
    """Whether a file's template writes one of the prompts otherwise than the model has learned it."""
    tokenizer = source.tokenizer
    if (
        not source.is_chat
        or not isinstance(tokenizer, HuggingFaceTokenizer)
        or not tokenizer.has_chat_template
    ):
        return False
    text = read_field(open_gguf(file), "tokenizer.chat_template")
    if not text:
        return True
    own = tokenizer.template
    template = ChatTemplate(tokenizer.tokenizer, text, own.arguments, own.today)
    turns = [(Message("user", output.prompt),) for output in source.outputs]
    try:
        return any(template.render_prompt(turn) != own.render_prompt(turn) for turn in turns)
    except ValueError:
        return True


def save_template(source: ExportSource, folder: Path) -> Path:
    """Write the template of the training as the command line of llama.cpp takes it."""
    assert isinstance(source.tokenizer, HuggingFaceTokenizer)
    template = source.tokenizer.template.source
    text = template if isinstance(template, str) else template["default"]
    (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8")
    return folder / TEMPLATE_FILE
