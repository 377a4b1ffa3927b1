"""Whether a TEMPLATE writes what the chat template does, character by character."""

from collections.abc import Iterator
from dataclasses import replace

from dpo_wrapper.commands.export.ollama.go_template import GoMessage, GoTemplate, GoTemplateError
from dpo_wrapper.commands.export.ollama.pieces import ChatPieces, without_thinking
from dpo_wrapper.commands.export.ollama.probe import REMEDY
from dpo_wrapper.data.rows.messages import Message, Turns
from dpo_wrapper.data.tokens.dialogue_text import common_prefix
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer

CONTENTS = (
    "What is {{ .Role }} or {{- end }} here?",
    'He said "no" and """yes""": {%- if x %} \\n {0}.',
    "One\n\n  two\tthree <b>4</b>",
    "Ünïcödé 日本 🙂",
    "Why 7?",
)
THOUGHT = "Hm, {{ .Thinking }}\nso be it."


def render_as_ollama(template: GoTemplate, turns: Turns, is_thinking: bool | None = None) -> str:
    """The prompt that Ollama makes of a dialogue whose roles alternate."""
    messages = [GoMessage(turn.role, turn.text, turn.extras.get("thinking", "")) for turn in turns]
    system = "\n\n".join(turn.text for turn in turns if turn.role == "system")
    values = {"System": system, "Messages": messages, "Response": ""}
    return template.render(values | {"Think": bool(is_thinking), "IsThinkSet": is_thinking is not None})


def make_dialogues() -> Iterator[Turns]:
    """Dialogues of up to four questions, with and without a system message and an answer to go on with."""
    for length in range(1, 9):
        roles = ["user" if k % 2 == 0 else "assistant" for k in range(length)]
        for front in ([], ["system"]):
            names = [*front, *roles]
            yield tuple(Message(role, CONTENTS[(k + length) % len(CONTENTS)]) for k, role in enumerate(names))


def add_thoughts(turns: Turns) -> Turns:
    """The dialogue as Ollama keeps it: an answer has a thought beside its content."""
    return tuple(
        replace(turn, extras={"thinking": THOUGHT}) if turn.role == "assistant" else turn for turn in turns
    )


def check_template(text: str, pieces: ChatPieces, tokenizer: HuggingFaceTokenizer) -> None:
    """Raise ValueError, with the place, if the two texts of a dialogue are not the same.

    Args:
        text: the TEMPLATE.
        pieces: of the chat template; a BOS that they leave out is in front of the text in use.
        tokenizer: has the chat template.
    """
    try:
        template = GoTemplate(text)
        num_compared = sum(
            compare_dialogue(template, pieces, tokenizer, turns)
            for plain in make_dialogues()
            for turns in ((plain, add_thoughts(plain)) if pieces.thought else (plain,))
        )
    except GoTemplateError as error:
        raise ValueError(f"{str(error).rstrip('.')}: {REMEDY}.") from error
    assert num_compared, "no dialogue that the chat template takes"


def compare_dialogue(
    template: GoTemplate, pieces: ChatPieces, tokenizer: HuggingFaceTokenizer, turns: Turns
) -> bool:
    """Whether there was something to compare; ValueError if the two texts are not the same."""
    given = as_chat_template_has_it(turns, pieces)
    marked = tuple(replace(turn, content=tokenizer.template.mark(turn.text)) for turn in turns)
    writers: list[tuple[bool | None, HuggingFaceTokenizer]] = [(None, tokenizer)]
    switched = without_thinking(tokenizer)
    if switched is not None and pieces.opening_without_thought is not None:
        writers.append((False, switched))
    for is_thinking, writer in writers:
        try:
            expected = writer.write_prompt(given).removeprefix(pieces.added_bos)
        except ValueError:  # the chat template takes no such dialogue
            return False
        text = render_as_ollama(template, marked, is_thinking)
        if text != expected:
            raise ValueError(describe_difference(turns, text, expected))
    return True


def as_chat_template_has_it(turns: Turns, pieces: ChatPieces) -> Turns:
    """The dialogue with thoughts in contents, of the last answer only: a chat template drops the others.

    Where it knows no system message, that stands in front of the first question's content.
    """
    given = [replace(turn, extras={}) for turn in turns]
    if thought := turns[-1].extras.get("thinking"):
        given[-1] = replace(given[-1], content=f"<think>\n{thought}\n</think>\n\n{given[-1].text}")
    if pieces.system_place == "none" and given[0].role == "system":
        system = given.pop(0)
        given[0] = replace(given[0], content=f"{system.text}\n\n{given[0].text}")
    return tuple(given)


def describe_difference(turns: Turns, text: str, expected: str) -> str:
    start = max(len(common_prefix(text, expected)) - 20, 0)
    found, wanted = (repr(one[start : start + 60]) for one in (text, expected))
    roles = ", ".join(turn.role for turn in turns)
    return (
        f"the chat template should be one that a Go template can write, but for the roles {roles} that "
        f"writes {found} in place of {wanted}: {REMEDY}."
    )
