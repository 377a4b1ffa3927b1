"""Hugging Face tokenizers: prompts as the model sees them in use, and completions that continue them."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_wrapper.data.rows.messages import Message, Turns, answer_turns
from dpo_wrapper.data.tokens.chat_template import ChatTemplate
from dpo_wrapper.data.tokens.dialogue_text import DialogueWriter
from dpo_wrapper.data.tokens.encoded import EncodedExample, Score, mask_tokens
from dpo_wrapper.data.tokens.literal_text import LiteralEncoder
from dpo_wrapper.libraries.error_text import summarize_error
from dpo_wrapper.libraries.hub import find_on_hub

_TEXT_ROLES = {"user": "Human", "assistant": "Assistant", "tool": "Tool"}


class HuggingFaceTokenizer:
    r"""A Hugging Face tokenizer as a `Tokenizer`.

    The ids of a prompt are those of the prompt alone, as at inference. The ids of a completion are those that
    follow them in the whole text. Where a token of the whole text spans the border, the completion is
    tokenized as what a model writes after these very ids of the prompt.

    A dialogue is written by the chat template; without one, as `\n\nHuman:` and `\n\nAssistant:` turns. The
    template may write less before an answer than at inference, such as no `<think>`: then the prompt ends
    where the two part. Special tokens that a text spells stay text, unless a plain prompt is a dialogue that
    a template has written already.

    Args:
        tokenizer: a tokenizer of transformers.
        chat_template: the text of a chat template to use in place of the tokenizer's own.
        template_arguments: what the template is called with besides the messages, like `enable_thinking`.
        today: the date for templates that print one; by default the day on which this is made.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        if getattr(tokenizer, "eos_token_id", None) is None:
            problem = f"the tokenizer should have an EOS token, but this {type(tokenizer).__name__} has none"
            raise ValueError(f"{problem}: set its eos_token to the token that ends an answer.")
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.bos_id: int | None = tokenizer.bos_token_id
        # A pad token that also stands for something else cannot tell padding from text.
        other_ids = (None, self.bos_id, self.eos_id, tokenizer.unk_token_id)
        self.pad_id: int = -100 if tokenizer.pad_token_id in other_ids else tokenizer.pad_token_id
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.template = ChatTemplate(tokenizer, chat_template, template_arguments, today)
        self.has_chat_template = bool(self.template.source)
        self._literal = LiteralEncoder(tokenizer, self.template.special_pattern, self.template.token_pattern)

    @classmethod
    def load(cls, name_or_folder: str | Path, **options: Any) -> "HuggingFaceTokenizer":
        """Load the tokenizer of a folder or of a model on the hub; ValueError if there is none."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            problem = "Hugging Face tokenizers need transformers"
            raise ImportError(f"{problem}: pip install 'dpo-wrapper[train]'.") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(find_on_hub(str(name_or_folder)))
        except Exception as error:  # OSError, ValueError, KeyError and more, by what is missing or broken
            reason = summarize_error(error)
            expected = "a folder that holds one or the name of a model on the hub"
            problem = f"the tokenizer should be {expected}, but '{name_or_folder}' is neither ({reason})"
            remedy = "save a tokenizer there with save_pretrained, check the name, or use 'bytes'"
            raise ValueError(f"{problem}: {remedy}.") from error
        return cls(tokenizer, **options)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token added; special tokens that it spells stay text."""
        return self._literal.encode(self.template.mark(text))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))

    def encode_prompt(self, prompt: str | Turns, tools: Sequence[Any] = ()) -> list[int]:
        """The ids of a prompt as a model sees them when it is used."""
        if not isinstance(prompt, str):
            return self._encode_dialogue(self.write_prompt(prompt, tools))
        return self._encode_plain(prompt if self.is_template_text(prompt) else self.template.mark(prompt))

    def encode_example(
        self,
        prompt: str | Turns,
        completions: Sequence[str | Turns],
        tools: Sequence[Any] = (),
        score: Score = "last",
    ) -> EncodedExample:
        """The ids of a prompt and of the completions that continue it, each with its end of turn."""
        if isinstance(prompt, str):
            return self._encode_plain_example(prompt, [str(text) for text in completions])
        answers = [tuple(map(self._strip_turn, answer_turns(completion))) for completion in completions]
        return self._encode_dialogues(prompt, answers, tools, score)

    def encode_text(self, text: str, masked_spans: Sequence[tuple[int, int]] = ()) -> EncodedExample:
        """The ids of a text as the completion of what the tokenizer puts in front, with an EOS at its end.

        Tokens with a character in one of the masked spans are not scored.
        """
        prompt = list(self._literal.prefix_ids)
        if not masked_spans:
            return EncodedExample(prompt, [[*self.encode(text), self.eos_id]])
        ids, offsets = self._literal.encode_with_offsets(text)
        scored = [False] * len(prompt) + mask_tokens(len(text), offsets, masked_spans)
        return EncodedExample(prompt, [[*ids, self.eos_id]], [scored])

    # plain text

    def _encode_plain_example(self, prompt: str, completions: list[str]) -> EncodedExample:
        is_written = self.is_template_text(prompt)
        opening = prompt if is_written else self.template.mark(prompt)
        stripped = [self._strip_end(completion) for completion in completions]
        if is_written:
            self._check_no_end_inside(stripped)
        rests = stripped if is_written else [self.template.mark(text) for text in stripped]
        wholes = self._literal.encode_all([opening, *(opening + rest for rest in rests)])
        ids, *wholes = map(self._literal.put_prefix, wholes)
        ends = self.tokenizer.convert_tokens_to_ids(self._end_of_turn) if is_written else []
        continued = [
            self._literal.continue_ids(ids, whole, rest) for whole, rest in zip(wholes, rests, strict=True)
        ]
        parts = [[*part, *(ends or [self.eos_id])] for part, _ in continued]
        is_continued = any(is_merged for _, is_merged in continued)
        return EncodedExample(ids, parts, is_continued=is_continued, is_template_text=is_written)

    def _check_no_end_inside(self, completions: list[str]) -> None:
        for text in completions:
            if self._ends.intersection(self.tokenizer(text, add_special_tokens=False)["input_ids"]):
                problem = "the completion should not hold an end of turn, but one stands inside it"
                raise ValueError(f"{problem}: write the row as messages, or remove it.")

    def is_template_text(self, prompt: str) -> bool:
        """Whether a plain prompt is a dialogue that a chat template has written already."""
        return self.template.has_written(prompt, self._opening)

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of a text after what the tokenizer puts in front of every text, such as a BOS."""
        return self._literal.put_prefix(self._literal.encode(text))

    def _strip_end(self, completion: str) -> str:
        """The completion without the tokens of an end of turn at its end and the white space around them."""
        ends = {self.tokenizer.eos_token, *self._end_of_turn}
        while end := next((end for end in ends if completion.rstrip().endswith(end)), None):
            completion = completion.rstrip().removesuffix(end)
        return completion

    def _strip_turn(self, turn: Message) -> Message:
        """An answer without an end of turn at its end, which the chat template writes."""
        is_text = turn.role == "assistant" and turn.content is not None
        return replace(turn, content=self._strip_end(turn.text)) if is_text else turn

    # dialogues

    def _encode_dialogues(
        self, prompt: Turns, answers: list[Turns], tools: Sequence[Any], score: Score
    ) -> EncodedExample:
        writer = DialogueWriter(
            prompt, tools, self.write_prompt, self.write_dialogue, self.template, self._end_of_turn
        )
        dialogues = [writer.write(answer, score) for answer in answers]
        border = min(dialogue.border for dialogue in dialogues)
        ids, given, is_continued = self._encode_segments(
            dialogues[0].text, dialogues[0].segments(0, border), []
        )
        parts, masks = [], []
        for dialogue in dialogues:
            segments = dialogue.segments(border, dialogue.end)
            sequence, scored, is_merged = self._encode_segments(dialogue.text, segments, ids)
            if not dialogue.is_ended:
                sequence, scored = [*sequence, self.eos_id], [*scored, True]
            parts.append(sequence[len(ids) :])
            masks.append([*given, *scored])
            is_continued |= is_merged
        is_usual = score == "last" and all(len(answer) == 1 for answer in answers)
        is_cut = border < len(writer.opened[0])
        return EncodedExample(ids, parts, None if is_usual else masks, is_continued, is_cut)

    def _encode_segments(
        self, text: str, segments: Sequence[tuple[int, int, bool]], before: list[int]
    ) -> tuple[list[int], list[bool], bool]:
        """The ids of a text after those before it, whether each is scored, and whether one spans a border."""
        ids, scored, is_continued = list(before), [], False
        for start, end, is_scored in segments:
            whole = self._encode_dialogue(text[:end])
            part, is_merged = (
                (whole, False) if start == 0 else self._literal.continue_ids(ids, whole, text[start:end])
            )
            ids += part
            scored += [is_scored] * len(part)
            is_continued |= is_merged
        return ids, scored, is_continued

    def write_prompt(self, prompt: Turns, tools: Sequence[Any] = ()) -> str:
        """The text of a prompt, up to where the answer begins."""
        if self.has_chat_template:
            return self.template.render_prompt(prompt, tools)
        text = self.write_dialogue(prompt, tools)
        return text if prompt[-1].role == "assistant" else f"{text}\n\nAssistant:"

    def write_dialogue(self, turns: Turns, tools: Sequence[Any] = ()) -> str:
        """The text of a whole dialogue, with marks in special tokens that a message spells."""
        if self.has_chat_template:
            return self.template.render(turns, tools)
        if tools or any(turn.needs_template for turn in turns):
            raise ValueError(
                "tools, tool calls and reasoning should have a chat template, but the tokenizer has none: "
                "give one by --chat-template, or leave the row out."
            )
        parts = [
            f"\n\n{_TEXT_ROLES.get(turn.role, 'System')}:{' ' * bool(turn.text)}{turn.text}" for turn in turns
        ]
        if turns[0].role in ("system", "developer"):
            parts[0] = turns[0].text
        return self.template.mark("".join(parts))

    def _encode_dialogue(self, text: str) -> list[int]:
        return self._literal.encode(text) if self.has_chat_template else self._encode_plain(text)

    @cached_property
    def _opening(self) -> str:
        """What the chat template writes to open an answer."""
        if not self.has_chat_template:
            return "\n\nAssistant:"
        try:
            question = (Message("user", "a"),)
            return self.template.render_prompt(question).removeprefix(self.template.render(question))
        except ValueError:
            return ""

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an answer: the last special token that the chat template writes after one."""
        tokens = self._end_of_turn
        return int(self.tokenizer.convert_tokens_to_ids(tokens[-1])) if tokens else self.eos_id

    @cached_property
    def _end_of_turn(self) -> list[str]:
        """The special tokens right behind an answer."""
        if not self.has_chat_template:
            return [self.tokenizer.eos_token]
        answer = "Yes, indeed"
        try:
            text = self.template.render((Message("user", "a"), Message("assistant", answer)))
        except ValueError:
            return []
        after, tokens = text.rpartition(answer)[2].lstrip(), []
        while match := self.template.special_pattern.match(after):
            tokens.append(match[0])
            after = after[match.end() :]
        return tokens

    @property
    def _ends(self) -> set[int]:
        return {self.eos_id, self.end_of_turn_id}

    def fingerprint(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            model = json.loads(backend.to_str())
            # Left behind by earlier calls, and overridden by every call here.
            model = {key: value for key, value in model.items() if key not in ("truncation", "padding")}
        else:
            model = {"class": type(self.tokenizer).__name__, "vocab": self.tokenizer.get_vocab()}
        template = [self.template.source, self.template.arguments]
        identity = {"model": model, "specials": [self.bos_id, self.eos_id, self.pad_id], "template": template}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def template_fingerprint(self) -> str:
        template = json.dumps([self.template.source, self.template.arguments], sort_keys=True)
        return hashlib.sha256(template.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        own = self.tokenizer.chat_template
        try:
            self.tokenizer.chat_template = self.template.source
            self.tokenizer.save_pretrained(str(folder))
        finally:
            self.tokenizer.chat_template = own
