"""Dialogues as a chat template writes them, whose contents cannot spell its control tokens."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

from dpo_wrapper.data.rows.messages import REASONING_KEYS, Message, Turns, iterate_texts, json_or_text
from dpo_wrapper.libraries.error_text import summarize_error

MARK = "\U0010fffd"
"""Stands inside what would be a control token if the template and not a message had written it."""

_THOUGHT_END = "</think>"
_WITNESS = "\U0010fffb"  # put into a part of a dialogue to see whether the template writes that part

_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class ChatTemplate:
    """The chat template of a tokenizer, or another one in its place.

    Args:
        tokenizer: a tokenizer of transformers.
        source: the template's text; by default that of the tokenizer.
        arguments: what the template is called with besides the messages, like `enable_thinking`.
        today: the date that the template prints, where it prints one.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.source = source or tokenizer.chat_template
        self.arguments = dict(arguments or {})
        self.today = today or date.today()
        added = [token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
        self.token_pattern = compile_pattern(map(str, added))
        self.special_pattern = compile_pattern(str(token) for token in added if is_control(token))

    def render_prompt(self, prompt: Turns, tools: Sequence[Any] = ()) -> str:
        """The text in front of an answer; a prompt that ends in an assistant's turn is continued."""
        if prompt[-1].role != "assistant":
            return self.render(prompt, tools, add_generation_prompt=True)
        return self.render(prompt, tools, continue_final_message=True)

    def render(self, turns: Turns, tools: Sequence[Any] = (), **options: bool) -> str:
        """The text of a dialogue; ValueError if the template refuses it or leaves an answer out."""
        problem = missing = None
        for variant in self._variants(turns):
            try:
                text = self._apply(variant, tools, options)
                lost = self._find_lost(variant, tools, options)
            except ImportError as error:
                raise ImportError("chat templates need jinja2: pip install 'dpo-wrapper[train]'.") from error
            except Exception as error:  # a template is a program: it may raise anything
                problem = problem or error
                continue
            if lost is None:
                return self._apply_thoughts(variant, tools, options, text)
            missing = missing or lost
        if missing is not None:
            remedy = (
                "ignore the column by --columns tools=" if missing == "the tools" else "leave the row out"
            )
            raise ValueError(
                f"the chat template should write all of the dialogue, but it leaves out {missing}: name "
                f"another template by --chat-template, or {remedy}."
            )
        assert problem is not None
        reason = summarize_error(problem)
        roles = ", ".join(turn.role for turn in turns)
        sentence = f"the chat template should take the roles {roles}, but it raises '{reason}'"
        raise ValueError(f"{sentence}: change the roles or leave the row out.") from problem

    def _apply_thoughts(self, turns: Turns, tools: Sequence[Any], options: dict[str, bool], text: str) -> str:
        """The text, or one with thoughts as `reasoning_content` if the template writes empty ones besides."""
        thoughts = tuple(map(split_thought, turns))
        count = sum(turn.text.count(_THOUGHT_END) for turn in turns)
        if thoughts == turns or text.count(_THOUGHT_END) <= count:
            return text
        try:
            other = self._apply(thoughts, tools, options)
        except Exception:  # as in render
            return text
        return other if other.count(_THOUGHT_END) < text.count(_THOUGHT_END) else text

    def _apply(self, turns: Turns, tools: Sequence[Any], options: dict[str, bool]) -> str:
        messages = self.mark([turn.as_dict() for turn in turns])
        text = self.tokenizer.apply_chat_template(
            messages,
            self.mark(list(tools)) or None,
            chat_template=self._dated_source(bool(tools)),
            tokenize=False,
            **options,
            **self.arguments,
        )
        return str(text)

    def _dated_source(self, has_tools: bool) -> str:
        """The template's text with the date written out: a library that renders it would take today's."""
        source = self.source
        if isinstance(source, Mapping):  # some tokenizers have a template of its own for tools
            source = source.get("tool_use" if has_tools else "default") or source["default"]
        return _DATE.sub(lambda match: json.dumps(self.today.strftime(match[2])), source)

    def mark(self, value: Any) -> Any:
        """The same with a mark inside each special token that a text spells."""
        if isinstance(value, str):
            return self.special_pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self.mark(part) for key, part in value.items()}
        return [self.mark(part) for part in value] if isinstance(value, (list, tuple)) else value

    def has_written(self, prompt: str, opening: str) -> bool:
        """Whether a plain prompt is a dialogue that a template wrote, which opens answers by `opening`."""
        text, opening = prompt.strip(), opening.strip()
        if opening and text.endswith(opening):
            return True
        start = self.special_pattern.match(text)
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        if start is None or start[0] not in (bos, eos):
            return start is not None
        # Such tokens may be HTML, as in <s>struck</s> text: then no opened answer ends the text.
        rest = text[start.end() :].lstrip()
        is_alone = start[0] == bos and self.special_pattern.search(rest) is None
        return is_alone or self.special_pattern.match(rest) is not None or rest.endswith((":", "]", ">"))

    def _variants(self, turns: Turns) -> list[Turns]:
        """The dialogue in the spellings that templates expect, the standard one first.

        Arguments of a tool call are an object, but some templates want JSON text. A call without text has no
        content, but some want an empty one, and others drop the call unless there is none. Few know the role
        of a developer, which replaces that of the system.
        """
        names = ["system"] if any(turn.role == "developer" for turn in turns) else [""]
        if names[0] and "developer" in str(self.source):
            names = ["developer", "system"]
        spellings = [(json_or_text, ""), (json_or_text, None), (as_json, None), (as_json, "")]
        if not any("tool_calls" in turn.extras for turn in turns):
            if not names[0]:
                return [turns]
            spellings = spellings[:1]

        def spell(turn: Message, developer: str, convert: Callable[[Any], Any], empty: str | None) -> Message:
            turn = replace(turn, role=developer) if turn.role == "developer" else turn
            if "tool_calls" not in turn.extras:
                return turn
            calls = [convert_arguments(call, convert) for call in turn.extras["tool_calls"]]
            return replace(turn, content=turn.content or empty, extras={**turn.extras, "tool_calls": calls})

        return [
            tuple(spell(turn, name, *spelling) for turn in turns) for name in names for spelling in spellings
        ]

    def _find_lost(self, turns: Turns, tools: Sequence[Any], options: dict[str, bool]) -> str | None:
        """What of tools, tool calls and turns the template leaves out; None if it writes all.

        Some templates skip what they do not know. So a witness is put into each part, and looked for.
        """
        if not tools and all(turn.role in ("user", "assistant") and not turn.extras for turn in turns):
            return None  # every template writes these
        witnesses: dict[str, str] = {}

        def witness(text: str, part: str) -> str:
            sign = f"{_WITNESS}{len(witnesses)}{_WITNESS}"
            witnesses[sign] = part
            return text + sign

        def rename(item: Any, part: str) -> Any:
            if isinstance(item, Mapping) and isinstance(item.get("function"), Mapping):
                return {**item, "function": rename(item["function"], part)}
            is_named = isinstance(item, Mapping) and isinstance(item.get("name"), str)
            return {**item, "name": witness(item["name"], part)} if is_named else item

        changed = []
        for turn in turns:
            content, extras = turn.content, dict(turn.extras)
            if turn.text.strip():
                content = witness(turn.text, f"the {turn.role} turn")
            if "tool_calls" in extras:
                extras["tool_calls"] = [rename(call, "a tool call") for call in extras["tool_calls"]]
            changed.append(replace(turn, content=content, extras=extras))
        text = self._apply(tuple(changed), [rename(tool, "the tools") for tool in tools], options)
        return next((part for sign, part in witnesses.items() if sign not in text), None)


def is_control(token: Any) -> bool:
    """Whether an added token structures a dialogue: some of DeepSeek's are not declared to be special."""
    return bool(token.special) or re.fullmatch(r"<[|｜].+[|｜]>", str(token)) is not None


def split_thought(turn: Message) -> Message:
    """An answer with the thought at its beginning as `reasoning_content`."""
    match = re.fullmatch(r"\s*<think>\n?(.*?)\n?</think>\s*(.*)", turn.text, re.DOTALL)
    if turn.role != "assistant" or match is None or any(turn.extras.get(key) for key in REASONING_KEYS):
        return turn
    return replace(turn, content=match[2], extras={**turn.extras, "reasoning_content": match[1]})


def compile_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of the tokens, the longest where several match."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def missing_part(answer: Message, text: str) -> str | None:
    """What of an answer is not in a template's text, white space aside; None if all of it is."""
    written = squeeze(text)
    if squeeze(answer.text) not in written:
        return "a part of the answer"
    names = [call.get("function", call)["name"] for call in answer.extras.get("tool_calls", ())]
    if any(squeeze(name) not in written for name in names):
        return "a tool call"
    for key in REASONING_KEYS:
        if any(squeeze(part) not in written for part in iterate_texts(answer.extras.get(key))):
            return f"the {key}"
    return None


def squeeze(text: str) -> str:
    """The text without white space and marks."""
    return "".join(text.replace(MARK, "").split())


def convert_arguments(call: Any, convert: Callable[[Any], Any]) -> Any:
    """A tool call with its arguments in another form."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": convert_arguments(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else call


def as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
