"""What Ollama needs to know of a tokenizer: TEMPLATE, default system message and where answers end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpo_wrapper.commands.export.ollama.modelfile import can_hold
from dpo_wrapper.commands.export.ollama.pieces import SWITCH, ChatPieces, probe_chat_template
from dpo_wrapper.commands.export.ollama.probe import make_turns
from dpo_wrapper.commands.export.ollama.template import write_template
from dpo_wrapper.commands.export.ollama.verify import check_template
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer

PLAIN = "{{ .Prompt }}"


@dataclass(frozen=True)
class OllamaTemplate:
    """What stands in a Modelfile beside the files.

    Attributes:
        text: the TEMPLATE.
        stops: texts at which an answer ends.
        system: the default system message; empty for none.
        notes: sentences on what it does otherwise than the chat template.
    """

    text: str
    stops: tuple[str, ...]
    system: str = ""
    notes: tuple[str, ...] = ()


def make_template(
    tokenizer: HuggingFaceTokenizer, end_ids: Sequence[int] = (), *, adds_bos: bool
) -> OllamaTemplate:
    """The TEMPLATE for a tokenizer's dialogues, which is known to write what the chat template does.

    Args:
        tokenizer: has the chat template.
        end_ids: tokens at which the model's answers end, beside those of the tokenizer.
        adds_bos: whether the GGUF file's tokenizer puts a BOS token in front of every text.

    Raises:
        ValueError: no template of Go does what the chat template does.
    """
    pieces, notes = probe_chat_template(tokenizer, adds_bos=adds_bos), []
    text = write_template(pieces)
    try:
        check_template(text, pieces, tokenizer)
    except ValueError:
        if pieces.opening_without_thought is None:
            raise
        pieces = replace(pieces, opening_without_thought=None)
        text = write_template(pieces)
        check_template(text, pieces, tokenizer)
        notes.append(
            f"The model's thoughts cannot be switched off in Ollama: its {SWITCH} changes other turns."
        )
    default = pieces.default_system
    is_default = can_hold(default) and is_default_system(tokenizer, default)
    system = default if is_default else ""
    stops = find_stops(tokenizer, pieces, end_ids)
    return OllamaTemplate(text, stops, system, (*notes, *describe_limits(tokenizer, pieces)))


def make_plain_template(tokenizer: HuggingFaceTokenizer, end_ids: Sequence[int] = ()) -> OllamaTemplate:
    """For a model that goes on with a plain text."""
    note = "The model was not trained on dialogues: it goes on with each message as it is."
    return OllamaTemplate(PLAIN, name_tokens(tokenizer, [tokenizer.eos_id, *end_ids]), notes=(note,))


def is_default_system(tokenizer: HuggingFaceTokenizer, content: str) -> bool:
    """Whether a dialogue with this system message is the same as one without."""
    if not content.strip():
        return False
    system, *others = make_turns("su")
    given = tokenizer.write_prompt((replace(system, content=content), *others))
    return given == tokenizer.write_prompt(tuple(others))


def find_stops(
    tokenizer: HuggingFaceTokenizer, pieces: ChatPieces, end_ids: Sequence[int]
) -> tuple[str, ...]:
    """The tokens that end an answer, and where there is none behind it, what opens the next question."""
    pattern, after_answer = tokenizer.template.special_pattern, pieces.answer[1]
    stops = pattern.findall(after_answer)
    if not stops:
        opening = after_answer + pieces.question[0]
        stops = pattern.findall(opening)[:1] or [opening.strip()]
    named = name_tokens(tokenizer, [tokenizer.eos_id, *end_ids])
    return tuple(dict.fromkeys(stop for stop in (*stops, *named) if stop))


def name_tokens(tokenizer: HuggingFaceTokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tokenizer.decode([id_], skip_special_tokens=False) for id_ in ids))


def describe_limits(tokenizer: HuggingFaceTokenizer, pieces: ChatPieces) -> list[str]:
    """What the template of Go leaves out, in sentences."""
    template, notes = tokenizer.template, []
    source = str(template.source)
    if "strftime_now" in source:
        date = template.today.strftime("%d %b %Y")
        notes.append(f"TEMPLATE holds the date of {date}: Ollama cannot write that of the day.")
    if pieces.system_place == "none":
        notes.append("The chat template has no system message: TEMPLATE puts it into the first question.")
    if re.search(r"\btools\b", source):
        notes.append("TEMPLATE writes no tools: Ollama refuses requests with tools for this model.")
    if pieces.thought is not None:
        notes.append("TEMPLATE needs Ollama 0.9 or newer, which takes thoughts out of answers.")
    if not keeps_white_space(tokenizer):
        notes.append(
            "TEMPLATE keeps white space around messages, which the chat template removes: send them without."
        )
    return notes


def keeps_white_space(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether the chat template leaves the white space around contents as it is."""
    turns = tuple(replace(turn, content=f"\n {turn.text} \n") for turn in make_turns("uau"))
    text = tokenizer.write_prompt(turns)
    return all(turn.text in text for turn in turns)
