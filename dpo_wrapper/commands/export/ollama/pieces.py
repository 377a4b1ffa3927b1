"""What a chat template writes around the messages of a dialogue, found by rendering dialogues with it."""

from dataclasses import dataclass

from dpo_wrapper.commands.export.ollama.probe import Probe, SystemPlace
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer

SWITCH = "enable_thinking"
"""The argument of chat templates that switches thoughts off."""


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
        is_message = self.default.startswith(before) and self.default.endswith(after)
        if self.system_place != "first" or not is_message:
            return ""
        return self.default[len(before) : len(self.default) - len(after)]


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
    without_thought = None
    if switched is not None:
        without_thought = Probe(switched).split_prompt("u")[1][len(after_question) :]
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
