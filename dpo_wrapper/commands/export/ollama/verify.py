"""Whether a TEMPLATE writes what the chat template does, character by character."""

from collections.abc import Iterator
from dataclasses import replace

from dpo_wrapper.commands.export.ollama.go_template import GoMessage, GoTemplate, GoTemplateError
from dpo_wrapper.commands.export.ollama.pieces import REMEDY, ChatPieces, without_thinking
from dpo_wrapper.data.rows.messages import Message, Turns
from dpo_wrapper.data.tokens.chat_template import split_thought
from dpo_wrapper.data.tokens.dialogue_text import common_prefix
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer

CONTENTS = (
    "What is {{ .Role }} or {{- end }} here?",
    'He said "no" and """yes""": {%- if x %} \\n {0}.',
    "One\n\n  two\tthree <b>4</b>",
    "Ünïcödé 日本 🙂",
    "x",
)
THOUGHT = "<think>\nHm, {{ .Thinking }}\nso be it.\n</think>\n\n"


def render_as_ollama(template: GoTemplate, turns: Turns, is_thinking: bool | None = None) -> str:
    """The prompt that Ollama makes of a dialogue whose roles alternate."""
    messages = []
    for turn in turns:
        thought = turn.extras.get("reasoning_content", "")
        messages.append(GoMessage(turn.role, turn.text, thought))
    system = "\n\n".join(turn.text for turn in turns if turn.role == "system")
    values = {"System": system, "Messages": messages, "Response": ""}
    return template.render(
        values | {"Think": bool(is_thinking), "IsThinkSet": is_thinking is not None}
    )


def make_dialogues() -> Iterator[Turns]:
    """Dialogues of up to four questions, with and without a system message and an answer to go on with."""
    for length in range(1, 9):
        roles = ["user" if k % 2 == 0 else "assistant" for k in range(length)]
        for front in ([], ["system"]):
            names = [*front, *roles]
            yield tuple(Message(role, CONTENTS[(k + length) % len(CONTENTS)]) for k, role in enumerate(names))


def add_thoughts(turns: Turns) -> Turns:
    return tuple(
        replace(turn, content=THOUGHT + turn.text) if turn.role == "assistant" else turn for turn in turns
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
    given = place_system(turns) if pieces.system_place == "none" else turns
    for is_thinking, writer in ((None, tokenizer), (False, without_thinking(tokenizer))):
        try:
            expected = writer.write_prompt(given)
        except ValueError:  # the chat template takes no such dialogue
            return False
        expected = expected.removeprefix(pieces.added_bos)
        marked = tuple(replace(turn, content=tokenizer.template.mark(turn.text)) for turn in turns)
        said = tuple(map(split_thought, marked)) if pieces.thought else marked
        text = render_as_ollama(template, said, is_thinking)
        if text != expected:
            raise ValueError(describe_difference(turns, text, expected))
    return True


def place_system(turns: Turns) -> Turns:
    """The dialogue with the system's message in front of the first question's content."""
    if turns[0].role != "system":
        return turns
    return (replace(turns[1], content=f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:])


def describe_difference(turns: Turns, text: str, expected: str) -> str:
    start = max(len(common_prefix(text, expected)) - 20, 0)
    found, wanted = (repr(one[start : start + 60]) for one in (text, expected))
    roles = ", ".join(turn.role for turn in turns)
    return (
        f"the chat template should be one that a Go template can write, but for the roles {roles} that writes "
        f"{found} in place of {wanted}: {REMEDY}."
    )
