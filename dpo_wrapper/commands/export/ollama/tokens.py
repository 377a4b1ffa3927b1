"""Whether the texts that Ollama makes of dialogues become the tokens that the model was trained on."""

from collections.abc import Iterator

from dpo_wrapper.commands.export.agreement import ExportError, Reader
from dpo_wrapper.commands.export.ollama.go_template import GoTemplate, GoTemplateError
from dpo_wrapper.commands.export.ollama.verify import render_as_ollama
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data.rows.messages import Message, Turns
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer


def check_tokens(
    template: str, source: ExportSource, tokenizer: HuggingFaceTokenizer, reader: Reader, *, adds_bos: bool
) -> None:
    """Raise ExportError unless TEMPLATE's texts become the tokens of the chat template's.

    Args:
        template: the TEMPLATE.
        source: has the prompts that exports are tried on.
        tokenizer: tokenizes where the program has no tokenizer.
        reader: the program.
        adds_bos: whether the program puts a BOS in front of every text.
    """
    bos = tokenizer.tokenizer.bos_token if adds_bos else None
    try:
        for prompt, text in render_prompts(GoTemplate(template), source, tokenizer):
            if bos is not None and text.startswith(bos):
                raise ExportError(
                    f"TEMPLATE should leave out {bos}, which Ollama puts in front, but it begins with it: do "
                    "not use it."
                )
            ids = reader.tokenize(text)
            if ids is None:
                ids = tokenizer.tokenizer((bos or "") + text, add_special_tokens=False)["input_ids"]
            if list(ids) != tokenizer.encode_prompt(prompt):
                raise ExportError(
                    "TEMPLATE should give the tokens that the model was trained on, but its text "
                    f"{(bos or '') + text!r} has others by {reader.name}: do not use it."
                )
    except GoTemplateError as error:
        raise ExportError(str(error)) from error


def render_prompts(
    template: GoTemplate, source: ExportSource, tokenizer: HuggingFaceTokenizer
) -> Iterator[tuple[str | Turns, str]]:
    """Prompts and what Ollama makes of them, but for those that spell special tokens.

    Ollama reads such tokens where the model has read text. White space around messages may be lost.
    """
    for output in source.outputs:
        if tokenizer.template.mark(output.prompt) != output.prompt:
            continue
        if not source.is_chat:
            yield output.prompt, template.render({"Prompt": output.prompt, "Response": ""})
            continue
        question = Message("user", output.prompt.strip())
        for prompt in ((question,), (question, Message("assistant", "Well, 1+1 is 2."), question)):
            yield prompt, render_as_ollama(template, prompt)
