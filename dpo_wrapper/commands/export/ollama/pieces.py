"""What a chat template writes around the messages of a dialogue, found by rendering dialogues with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dpo_wrapper.data.rows.messages import Message, Turns
from dpo_wrapper.data.tokens.dialogue_text import common_prefix
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer

SystemPlace = Literal["first", "last question", "none"]
"""Where the system message stands: in front of all, in the last message of the user, or nowhere."""

SWITCH = "enable_thinking"
"""The argument of chat templates that switches thoughts off."""

REMEDY = (
    "write the TEMPLATE by hand, or use the GGUF file by `llama-server --jinja`, which has the chat template"
)


@dataclass(frozen=True)
class ChatPieces:
    """The texts that stand around contents; questions are the user's messages, answers the assistant's.

    Attributes:
        bos: what TEMPLATE begins with.
        added_bos: what the file's tokenizer puts in front of that.
        default: the system's turn where a dialogue has no system message.
        system_place: where its content stands; for 'none', TEMPLATE puts it into the first question.
        system: around its content; in a question, from where that begins.
        first_question: in front of the first one, where there is no system message.
        question_after_system: in front of the first one, behind the system message.
        question: around any other.
        answer: around an answer.
        last_answer: in front of an answer that the model goes on with.
        opening: in front of an answer that the model begins.
        opening_without_thought: the same where thinking is switched off; None without such a switch.
        thought: around the thought of an answer that the model goes on with; None if there are no thoughts,
            or those of earlier answers stay in the text.
    """

    bos: str
    added_bos: str
    default: str
    system_place: SystemPlace
    system: tuple[str, str]
    first_question: str
    question_after_system: str
    question: tuple[str, str]
    answer: tuple[str, str]
    last_answer: str
    opening: str
    opening_without_thought: str | None
    thought: tuple[str, str] | None

    @property
    def default_system(self) -> str:
        """The content of the default system message; empty where there is none, or it is no message."""
        before, after = self.system
        has_content = len(self.default) > len(before) + len(after)
        if self.system_place != "first" or not has_content or not self.default.startswith(before):
            return ""
        return (
            self.default[len(before) : len(self.default) - len(after)] if self.default.endswith(after) else ""
        )


def probe_chat_template(tokenizer: HuggingFaceTokenizer, *, adds_bos: bool) -> ChatPieces:
    """The pieces of a tokenizer's chat template.

    Args:
        adds_bos: whether the file's tokenizer puts a BOS token in front of every text.

    Raises:
        ValueError: it has no such pieces.
    """
    probe = Probe(tokenizer)
    begin, between, end_answer, *_, end_question = probe.split_prompt("uauau")
    closed = probe.split_dialogue("ua")
    system_place, front = probe.find_system()
    after_answer = probe.cut(end_answer, closed[2])
    question = end_answer[len(after_answer) :]
    token, bos = tokenizer.tokenizer.bos_token, ""
    if token and all(start.startswith(token) for start in (begin, *front[:1])):
        bos = token if adds_bos or token not in question else ""  # in Llama 2 it begins each question
    after_question = probe.cut(between, end_question, probe.split_dialogue("u")[1])
    rest = begin[len(bos) :]
    default = rest.removesuffix(question) if rest.endswith(question) else ""
    first_question = rest[len(default) :]
    system, after_system = ("", ""), question
    if system_place == "first":
        behind = front[1]
        after_system = next((one for one in (question, first_question) if behind.endswith(one)), "")
        system = (front[0][len(bos) :], behind[: len(behind) - len(after_system)])
    elif system_place == "last question":
        system = (front[0][len(bos) :], front[1])
    else:
        system = (first_question, "\n\n")
    last_answer, thought = probe.find_last_answer()
    if thought is not None:
        thought = (thought[0][len(after_question) :], thought[1])
    switched = without_thinking(tokenizer)
    without_thought = (
        None if switched is None else Probe(switched).split_prompt("u")[1][len(after_question) :]
    )
    return ChatPieces(
        bos="" if adds_bos else bos,
        added_bos=bos if adds_bos else "",
        default=default,
        system_place=system_place,
        system=system,
        first_question=first_question,
        question_after_system=after_system,
        question=(question, after_question),
        answer=(between[len(after_question) :], after_answer),
        last_answer=(last_answer or between)[len(after_question) :],
        opening=end_question[len(after_question) :],
        opening_without_thought=without_thought,
        thought=thought,
    )


def without_thinking(tokenizer: HuggingFaceTokenizer) -> HuggingFaceTokenizer | None:
    """The same with thinking switched off; None where the template has no such switch, or it is set."""
    template = tokenizer.template
    if SWITCH not in str(template.source) or SWITCH in template.arguments:
        return None
    arguments = {**template.arguments, SWITCH: False}
    return HuggingFaceTokenizer(tokenizer.tokenizer, template.source, arguments, template.today)


class Probe:
    """Renders dialogues, given by the initials of their roles, and cuts the texts at their contents."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.tokenizer = tokenizer

    def split_prompt(self, roles: str) -> list[str]:
        """The pieces of a prompt, which ends by opening the answer."""
        return self._split(roles, self.tokenizer.write_prompt)

    def split_dialogue(self, roles: str) -> list[str]:
        """The pieces of a dialogue that is over."""
        return self._split(roles, self.tokenizer.write_dialogue)

    def find_last_answer(self) -> tuple[str, tuple[str, str] | None]:
        """What stands in front of an answer that the model goes on with, and around its thought.

        The thought is None if the template keeps it in earlier answers as well.
        """
        question, answer, other = make_turns("uau")
        thinking = Message("assistant", f"<think>\nzqthoughtqz\n</think>\n\n{answer.text}")
        try:
            before = self.split_prompt("ua")[1]
        except ValueError:  # the template refuses to have an answer continued
            before = ""
        if "zqthoughtqz" in self.tokenizer.write_prompt((question, thinking, other)):
            return before, None
        try:
            text = self.tokenizer.write_prompt((question, thinking))
        except ValueError:  # it drops the thought of an answer that is continued, too
            return before, (f"{self.split_prompt('uau')[1]}<think>\n", "\n</think>\n\n")
        _, start, end, _ = split_text(text, [question.text, "zqthoughtqz", answer.text])
        return before, (start, end)

    def find_system(self) -> tuple[SystemPlace, list[str]]:
        """Where the system message stands, and the pieces around its content."""
        turns = make_turns("suau")
        try:
            text = self.tokenizer.write_prompt(turns)
        except ValueError:
            return "none", []
        places = [text.find(turn.text) for turn in turns]
        if places[0] < places[1]:
            return "first", split_text(text, [turn.text for turn in turns])[:2]
        if places[2] < places[0] < places[3]:
            return "last question", self.split_prompt("su")[:2]
        raise ValueError(
            "the chat template should write the system message in front of the dialogue or of its last "
            f"message, but it has another place for it: {REMEDY}."
        )

    def cut(self, *texts: str) -> str:
        """What texts have in common at their beginning, but no part of a token."""
        first, *others = texts
        length = len(first)
        for other in others:
            length = min(length, len(common_prefix(first, other)))
        for text in texts:
            for match in self.tokenizer.template.token_pattern.finditer(text):
                if match.start() < length < match.end():
                    length = match.start()
        return first[:length]

    def _split(self, roles: str, write: Callable[[Turns], str]) -> list[str]:
        turns = make_turns(roles)
        return split_text(write(turns), [turn.text for turn in turns])


def make_turns(roles: str) -> Turns:
    """A dialogue with contents that a template does not write by itself."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message(names[role], f"zq{k}qz") for k, role in enumerate(roles))


def split_text(text: str, contents: Sequence[str]) -> list[str]:
    """The pieces of a text in front of, between and behind contents; ValueError if one is not there once."""
    pieces = []
    for content in contents:
        if text.count(content) != 1:
            raise ValueError(
                f"the chat template should write each message once and in order, but it does not: {REMEDY}."
            )
        piece, _, text = text.partition(content)
        pieces.append(piece)
    return [*pieces, text]
