"""A dialogue as one text, and where its answers stand in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from dpo_wrapper.data.rows.messages import Message, Turns, join_answer
from dpo_wrapper.data.tokens.chat_template import ChatTemplate, missing_part
from dpo_wrapper.data.tokens.encoded import Score

Write = Callable[[Turns, Sequence[Any]], str]


@dataclass(frozen=True)
class DialogueText:
    """A dialogue as one text.

    Attributes:
        text: all of it.
        answers: start and end of each answer that is scored.
        border: where the prompt ends and the completion begins.
        is_ended: whether an end of turn closes the last answer.
    """

    text: str
    answers: list[tuple[int, int]]
    border: int
    is_ended: bool

    @property
    def end(self) -> int:
        """Where the last answer ends."""
        return self.answers[-1][1]

    def segments(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """The text from `start` to `end`, cut where answers begin and end, and which segments are answers."""
        cuts = sorted({start, end, *(cut for answer in self.answers for cut in answer if start < cut < end)})
        spans = pairwise(cuts)
        return [(a, b, any(first <= a and b <= last for first, last in self.answers)) for a, b in spans]


@dataclass(frozen=True)
class DialogueWriter:
    """Writes the dialogues of one prompt and finds their answers.

    Attributes:
        prompt, tools: what all of them have.
        write_prompt: the text in front of an answer, as at inference.
        write_dialogue: the text of a whole dialogue.
        end_of_turn: the special tokens that end an answer.
    """

    prompt: Turns
    tools: Sequence[Any]
    write_prompt: Write
    write_dialogue: Write
    template: ChatTemplate
    end_of_turn: list[str]

    @cached_property
    def opened(self) -> tuple[str, str]:
        """What `open_answer` gives for the prompt."""
        return self.open_answer(self.prompt)

    def open_answer(self, prompt: Turns) -> tuple[str, str]:
        """The text in front of an answer, and the part of it that does not open the answer."""
        if not prompt:
            return "", ""
        opening = self.write_prompt(prompt, self.tools)
        return opening, common_prefix(opening, self.write_dialogue(prompt, self.tools))

    def write(self, answer: Turns, score: Score) -> DialogueText:
        """The text of the prompt with an answer; ValueError if the template leaves a part of it out."""
        turns = join_answer(self.prompt, answer)
        num_given = len(self.prompt) - (self.prompt[-1].role == "assistant")
        text = self.write_dialogue(turns, self.tools)
        answers, border = [], 0
        for k, turn in enumerate(turns):
            if turn.role == "assistant" and (k >= num_given or score == "assistant"):
                said = answer[k - num_given] if k >= num_given else turn
                opening, earlier = self.opened if k == num_given else self.open_answer(turns[:k])
                start, end = self.find_answer(text, turns, k, opening, earlier, said)
                answers.append((start, end))
                border = start if k == num_given else border
        end = answers[-1][1]
        return DialogueText(text, answers, border, self.ends_turn(text[:end]))

    def find_answer(
        self, text: str, turns: Turns, k: int, opening: str, earlier: str, said: Message
    ) -> tuple[int, int]:
        """Where turn k stands in the text of a dialogue: `said`, after what `open_answer` has given."""
        if not text.startswith(earlier):
            raise ValueError(
                f"the chat template should write the turns before turn {k + 1} alike in a longer dialogue, "
                "but it changes them: name another template by --chat-template, or leave the row out."
            )
        closed = text if k + 1 == len(turns) else self.write_dialogue(turns[: k + 1], self.tools)
        start, end = (self.last_border(one, text) for one in (opening, closed))
        end = max(end, start)
        after = self.template.special_pattern.match(text, end)
        token = "".join(self.end_of_turn)
        place = text.rfind(token, start, end) if token else -1
        if place >= 0:
            end = place + len(token)
        elif after is not None and not self.ends_turn(text[start:end]):
            end = after.end()  # the token that opens the next turn ends this one
        else:
            end = start + len(text[start:end].rstrip())
        missing = missing_part(said, text[len(earlier) : end])
        if missing is not None and token and (place := text.find(token, start)) >= 0:
            end = place + len(token)  # an answer that is not the last is written otherwise
            missing = missing_part(said, text[len(earlier) : end])
        if missing is not None:
            raise ValueError(
                f"the chat template should keep the answer whole, but it leaves out {missing}: name another "
                "template by --chat-template, or leave the row out."
            )
        return start, end

    def last_border(self, one: str, other: str) -> int:
        """How far two texts agree, but not into a token of one of them."""
        length = len(common_prefix(one, other))
        for text in (one, other):
            for match in self.template.token_pattern.finditer(text, max(0, length - 200)):
                if match.start() < length < match.end():
                    length = match.start()
        return length

    def ends_turn(self, text: str) -> bool:
        """Whether a text ends in a special token."""
        last = max((match.end() for match in self.template.special_pattern.finditer(text)), default=0)
        return last == len(text) > 0


def common_prefix(one: Any, other: Any) -> Any:
    """The longest beginning that two texts or lists have in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halves are compared at once: texts are long
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return one[:low]
