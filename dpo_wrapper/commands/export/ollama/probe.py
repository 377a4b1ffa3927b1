"""Dialogues that are rendered by a chat template to see what it writes around their contents."""

from collections.abc import Callable, Sequence
from typing import Literal

from dpo_wrapper.data.rows.messages import Message, Turns
from dpo_wrapper.data.tokens.dialogue_text import common_prefix
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer

SystemPlace = Literal["first", "last question", "none"]
"""Where the system message stands: in front of all, in the last message of the user, or nowhere."""

REMEDY = (
    "write the TEMPLATE by hand, or use the GGUF file by `llama-server --jinja`, which has the chat template"
)


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
