"""`dpo-wrapper chat`: a loop of messages and answers in the terminal, or one answer."""

import sys
from contextlib import suppress
from typing import Any

from torch import nn

from dpo_wrapper.commands.chat.answer import stream_answer
from dpo_wrapper.commands.chat.config import ChatConfig
from dpo_wrapper.commands.chat.conversation import Conversation
from dpo_wrapper.display.terminal import replace_controls
from dpo_wrapper.evaluation.model_pair import NO_REFERENCE, ModelPair, load_model_pair
from dpo_wrapper.evaluation.sampling import derive_seed

COMMANDS = {"/help": "lists the commands", "/reset": "forgets the conversation", "/exit": "leaves"}
KNOWN_COMMANDS = ", ".join(f"{name} {what}" for name, what in COMMANDS.items())


class Chat:
    """A model, perhaps with its reference, and the conversation with it.

    Raises:
        ValueError: the model or its reference cannot be loaded, or a system's message has no dialogue.
    """

    def __init__(self, config: ChatConfig) -> None:
        self.config = config
        self.pair = load_pair(config)
        is_dialogue = find_is_dialogue(config, self.pair)
        if config.system is not None and not is_dialogue:
            raise ValueError(
                f"--system should stand in a dialogue, but {config.model} has no chat template: leave it "
                "out, or give --as-chat always."
            )
        options: Any = {"is_dialogue": is_dialogue, "system": config.system}
        self.conversation = Conversation(self.pair.tokenizer, **options)

    def answer(self, text: str) -> bool:
        """Print the answers to a message, and remember the model's own; returns whether one was stopped.

        Raises:
            ValueError: the chat template refuses the dialogue.
        """
        prompt = self.encode(text)
        label = "model      " if self.config.shows_reference else ""
        answer, is_stopped = self.print_answer(label, self.pair.policy.model, prompt)
        if self.config.shows_reference and not is_stopped:
            with self.pair.reference_model() as reference:
                _, is_stopped = self.print_answer("reference  ", reference, prompt)
        if answer or not is_stopped:
            self.conversation.add(text, answer)
        return is_stopped

    def print_answer(self, label: str, model: nn.Module | None, prompt: list[int]) -> tuple[str, bool]:
        """Print an answer while it is generated; returns it, and whether it was stopped."""
        print(label, end="", flush=True)
        result = stream_answer(
            model,
            prompt,
            self.pair.tokenizer,
            self.config.max_new_tokens,
            print_piece,
            sampling=self.config.sampling,
            seed=derive_seed(self.config.seed, self.conversation.num_answers),
            max_positions=self.pair.policy.max_positions,
        )
        print(flush=True)
        return result

    def encode(self, text: str) -> list[int]:
        """The ids in front of the answer to a message; says so if not all of them fit into the model."""
        prompt = self.conversation.encode(text)
        positions = self.pair.policy.max_positions
        if positions is None:
            return prompt
        room = positions - min(self.config.max_new_tokens, positions // 2)
        if (num_tokens := len(prompt)) > room:
            prompt = self.conversation.encode(text, room)
            left_out = f"the earliest {num_tokens - len(prompt)} of {num_tokens} tokens are left out"
            print(f"({left_out}, for the model has {positions} positions)", file=sys.stderr)
        return prompt


def load_pair(config: ChatConfig) -> ModelPair:
    """The model, with its reference if that is shown.

    Raises:
        ValueError: a model cannot be loaded, or there is no reference to show.
    """
    pair = load_model_pair(
        config.model,
        config.reference_model if config.shows_reference else NO_REFERENCE,
        **config.loading,
    )
    if config.shows_reference and not pair.has_reference:
        why = pair.description.removeprefix("reference: ").rstrip(".")
        raise ValueError(
            f"--reference should have a model to show, but there is {why}: name one by --reference-model."
        )
    return pair


def find_is_dialogue(config: ChatConfig, pair: ModelPair) -> bool:
    """Whether messages are turns of a dialogue."""
    setting = config.as_chat
    if setting == "auto":
        setting = pair.run.get("settings", {}).get("as_chat", "auto")
    return pair.tokenizer.has_chat_template if setting == "auto" else setting == "always"


def run_chat(config: ChatConfig) -> None:
    """Print one answer, or talk until the input ends.

    Raises:
        ValueError, OSError, ImportError: the model cannot be loaded, or its template refuses the prompt.
        KeyboardInterrupt: the one answer was stopped.
    """
    chat = Chat(config)
    if config.prompt is not None:
        if chat.answer(repair_text(config.prompt)):
            raise KeyboardInterrupt
        return
    print_opening(chat)
    while (text := read_message()) not in (None, "/exit"):
        try:
            reply(chat, text or "")
        except KeyboardInterrupt:  # before the first token
            print("(stopped)\n")
        except ValueError as error:
            print(f"({error})")


def reply(chat: Chat, text: str) -> None:
    """Do what a message asks for, if it is a command, or print the answer to it."""
    if text == "/reset":
        chat.conversation.reset()
    elif text == "/help":
        print(f"{KNOWN_COMMANDS}; Ctrl-C stops an answer, Ctrl-D leaves")
    elif is_command(text):
        print(f"({text} is no command: {KNOWN_COMMANDS})")
    elif text:
        print("(stopped)\n" if chat.answer(text) else "")


def print_opening(chat: Chat) -> None:
    """Say what one talks with, and how."""
    config = chat.config
    print(f"{config.model}: {KNOWN_COMMANDS}")
    if not chat.conversation.is_dialogue:
        print("Each message is a prompt of its own, which the model continues.")
    if config.shows_reference:
        print(chat.pair.description)
    print()


def read_message() -> str | None:
    """A line from the terminal; None at its end. Ctrl-C empties the line."""
    with suppress(ImportError):  # lines are edited, and earlier ones come back with the arrow keys
        import readline  # noqa: F401
    while True:
        try:
            return repair_text(input("> " if sys.stdin.isatty() else "")).strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")


def is_command(text: str) -> bool:
    """Whether a message looks like a command, and not like a path or a sentence."""
    return text.startswith("/") and text[1:].isalpha()


def repair_text(text: str) -> str:
    """The text, in which bytes that are no UTF-8 are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def print_piece(text: str) -> None:
    print(replace_controls(text), end="", flush=True)
