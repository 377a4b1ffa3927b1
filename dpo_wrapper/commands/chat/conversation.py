"""What was said so far, and the tokens that a model answers to."""

from dpo_wrapper.data import Message, Tokenizer
from dpo_wrapper.data.tokens.truncate import cut_dialogue


class Conversation:
    """Messages and answers; or single prompts, where a model is not trained on dialogues.

    Args:
        tokenizer: of the model.
        is_dialogue: whether messages are turns that a model remembers; otherwise each is a prompt of its own,
            which the answer continues.
        system: message of the system in front of a dialogue.
    """

    def __init__(self, tokenizer: Tokenizer, *, is_dialogue: bool, system: str | None = None) -> None:
        self.tokenizer, self.is_dialogue = tokenizer, is_dialogue
        self.start = () if system is None else (Message("system", system),)
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but for the system's message."""
        self.turns: tuple[Message, ...] = self.start
        self.num_answers = 0

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """The ids in front of the answer to a message, of at most `max_tokens` the last turns.

        Raises:
            ValueError: the chat template refuses the dialogue, or there is no token.
        """
        turns = (*self.turns, Message("user", text))
        if self.is_dialogue and max_tokens is not None:
            turns = cut_dialogue(turns, (), max_tokens, self.tokenizer)
        ids = self.tokenizer.encode_prompt(turns if self.is_dialogue else text)
        if not ids:
            raise ValueError("a prompt should have at least one token, but it has none: write a text.")
        return ids if max_tokens is None else ids[-max_tokens:]

    def add(self, text: str, answer: str) -> None:
        """Remember a message and its answer."""
        self.num_answers += 1
        if self.is_dialogue:
            self.turns = (*self.turns, Message("user", text), Message("assistant", answer))
