"""The TEMPLATE of a Modelfile, which writes what a chat template does."""

import json
from dataclasses import dataclass

from dpo_wrapper.commands.export.ollama.pieces import ChatPieces
from dpo_wrapper.data.tokens.dialogue_text import common_prefix

IS_SWITCHED_OFF = "and $.IsThinkSet (not $.Think)"
FIRST_IS_SYSTEM = '(eq (index $.Messages 0).Role "system")'


@dataclass(frozen=True)
class Action:
    """What stands between double braces."""

    code: str


Part = str | Action


def write_template(pieces: ChatPieces) -> str:
    """The template in Go's language, with each of Ollama's messages between its pieces."""
    parts: list[Part] = [pieces.bos]
    parts += [Action("range $i, $_ := .Messages"), Action("$last := eq (len (slice $.Messages $i)) 1")]
    if pieces.default:
        parts += when('and (eq $i 0) (ne .Role "system")', [pieces.default])
    if pieces.system_place == "first":
        before, after = pieces.system
        parts += [Action('if eq .Role "system"'), before, Action(".Content"), after]
        parts += [Action('else if eq .Role "user"')]
    else:
        parts += [Action('if eq .Role "user"')]
    parts += [*write_question(pieces), Action(".Content"), pieces.question[1]]
    parts += [Action('else if eq .Role "assistant"'), *write_answer(pieces), Action("end")]
    parts += when('and $last (ne .Role "assistant")', write_opening(pieces))
    return format_parts([*parts, Action("end")])


def write_question(pieces: ChatPieces) -> list[Part]:
    """What stands in front of a message of the user, and of the system where that is a part of it."""
    question, _ = pieces.question
    starts: list[tuple[str, list[Part]]] = []
    if pieces.system_place != "first" and any(pieces.system):
        before, after = pieces.system
        place = "$last" if pieces.system_place == "last question" else "(eq $i 1)"
        if before == question == pieces.first_question:  # then one branch is enough
            return [question, *when(f"and $.System {place}", [Action("$.System"), after])]
        starts.append((f"and $.System {place}", [before, Action("$.System"), after]))
    if pieces.first_question != question:
        starts.append(("eq $i 0", [pieces.first_question]))
    if pieces.system_place == "first" and pieces.question_after_system != question:
        starts.append((f"and (eq $i 1) {FIRST_IS_SYSTEM}", [pieces.question_after_system]))
    return choose(starts, [question])


def write_opening(pieces: ChatPieces) -> list[Part]:
    """What stands in front of the model's answer."""
    opening, other = pieces.opening, pieces.opening_without_thought
    if other is None or other == opening:
        return [opening]
    start = common_prefix(opening, other) if other.startswith(opening) else ""
    return [start, *choose([(IS_SWITCHED_OFF, [other[len(start) :]])], [opening[len(start) :]])]


def write_answer(pieces: ChatPieces) -> list[Part]:
    """An answer, which ends nowhere if it is the last message: the model goes on with it."""
    before, after = pieces.answer
    starts: list[tuple[str, list[Part]]] = []
    header = ""
    if pieces.thought is not None:
        start, end = pieces.thought
        header = common_prefix(common_prefix(start, before), pieces.last_answer)
        header = header[: header.rfind("<think>")] if "<think>" in header else header
        starts.append(("and $last .Thinking", write_thought(start[len(header) :], end)))
    if pieces.last_answer != before:
        starts.append(("$last", [pieces.last_answer[len(header) :]]))
    front = choose(starts, [before[len(header) :]])
    return [header, *front, Action(".Content"), *when("not $last", [after])]


def write_thought(start: str, end: str) -> list[Part]:
    """A thought with its tags.

    Ollama takes what stands between these tags out of answers. It reads them here: they are the first and
    the last text of the block around .Thinking, so that another text has to stand outside of it.
    """
    place = start.rfind("<think>")
    thought: list[Part] = [start[place:], Action(".Thinking"), end]
    return [start[:place], *when(".Thinking", thought)] if place > 0 else thought


def when(condition: str, parts: list[Part]) -> list[Part]:
    return [Action(f"if {condition}"), *parts, Action("end")] if any(parts) else []


def choose(cases: list[tuple[str, list[Part]]], otherwise: list[Part]) -> list[Part]:
    """The parts of the first case that holds."""
    if not cases:
        return otherwise
    if len(cases) == 1 and not any(cases[0][1]):
        return when(f"not ({cases[0][0]})", otherwise)
    chosen: list[Part] = []
    for k, (condition, parts) in enumerate(cases):
        chosen += [Action(f"{'else if' if k else 'if'} {condition}"), *parts]
    return [*chosen, *([Action("else"), *otherwise] if any(otherwise) else []), Action("end")]


def format_parts(parts: list[Part]) -> str:
    """The text of a template: actions beside one another stand on lines of their own."""
    text, is_after_action = "", False
    for part in parts:
        if isinstance(part, Action):
            text += f"\n{{{{- {part.code} }}}}" if is_after_action else f"{{{{ {part.code} }}}}"
            is_after_action = True
        elif part:
            text += escape(part)
            is_after_action = False
    return text


def escape(text: str) -> str:
    """A text as it stands in a template, or an action that prints it where it cannot.

    A brace could open an action, three quotes would end the TEMPLATE, and Ollama drops characters of a
    Modelfile that cannot be printed.
    """
    is_plain = "{" not in text and '"""' not in text and '"' not in (text[0], text[-1])
    if is_plain and all(character == "\n" or character == "\t" or is_kept(character) for character in text):
        return text
    return f"{{{{ {quote(text)} }}}}"


def quote(text: str) -> str:
    """A text as a string of Go."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(one if is_kept(one) else f"\\U{ord(one):08x}" for one in quoted)


def is_kept(character: str) -> bool:
    """Whether Ollama keeps a character of a Modelfile."""
    return character.isprintable()
