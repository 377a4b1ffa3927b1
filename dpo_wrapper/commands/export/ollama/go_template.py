"""The part of Go's text/template that a Modelfile's TEMPLATE is written in, to see what Ollama will write."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_wrapper.commands.export.ollama.go_expressions import (
    GoTemplateError,
    Scope,
    Token,
    Tokens,
    format_value,
    parse_expression,
)

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<number>-?\d+)|(?P<name>[A-Za-z]\w*)"""
    r"""|(?P<path>\$\w*(?:\.\w+)*|(?:\.\w+)+|\.)|(?P<sign>:=|=|,|\(|\)))"""
)
_OPEN = re.compile(r"[ \t\r\n]*\{\{-[ \t\r\n]|\{\{")
_CLOSE = re.compile(r"[ \t\r\n]+-\}\}[ \t\r\n]*|[ \t\r\n]*\}\}")


@dataclass(frozen=True)
class GoMessage:
    """A message as Ollama gives it to a template."""

    Role: str
    Content: str
    Thinking: str = ""


Node = Callable[[Scope], str]


class GoTemplate:
    """A parsed template.

    Raises:
        GoTemplateError: the text is no template.
    """

    def __init__(self, text: str) -> None:
        self._parts = list(split_actions(text))
        self._place = 0
        self._root, end = self._parse_block(0)
        assert end == ""

    def render(self, data: Mapping[str, Any]) -> str:
        """The text for these values; GoTemplateError where Go would stop."""
        scope = Scope(data)
        scope.values["$"] = data
        try:
            return self._root(scope)
        except (TypeError, IndexError, AttributeError, RecursionError) as error:
            raise GoTemplateError(f"the template cannot be rendered: {error}.") from error

    def _parse_block(self, depth: int) -> tuple[Node, str]:
        """What stands up to the `end` or `else` of this block, and that word with what follows it."""
        nodes: list[Node] = []
        while self._place < len(self._parts):
            part = self._parts[self._place]
            self._place += 1
            if isinstance(part, str):
                nodes.append(lambda scope, text=part: text)  # type: ignore[misc]
                continue
            word = part[0][1] if part else ""
            if word in ("end", "else"):
                if depth == 0:
                    raise GoTemplateError(f"the template should open a block before its {word}.")
                return join(nodes), " ".join(text for _, text in part[:2])
            if word == "if":
                nodes.append(self._parse_if(part[1:], depth + 1))
            elif word == "range":
                nodes.append(self._parse_range(part[1:], depth + 1))
            else:
                nodes.append(parse_action(part))
        if depth:
            raise GoTemplateError("the template should close each block by end, but one is open.")
        return join(nodes), ""

    def _parse_if(self, tokens: "Tokens", depth: int) -> Node:
        condition = parse_expression(tokens)
        body, end = self._parse_block(depth)
        otherwise: Node = join([])
        if end == "else if":
            otherwise = self._parse_if(self._parts[self._place - 1][2:], depth)  # type: ignore[arg-type]
        elif end == "else":
            otherwise, _ = self._parse_block(depth)
        return lambda scope: (body if condition(scope) else otherwise)(Scope(scope.dot, scope))

    def _parse_range(self, tokens: "Tokens", depth: int) -> Node:
        start = tokens.index(("sign", ":=")) + 1 if ("sign", ":=") in tokens else 0
        names = [text for kind, text in tokens[:start] if kind == "path"]
        items = parse_expression(tokens[start:])
        body, end = self._parse_block(depth)
        if end != "end":
            raise GoTemplateError("the template should close a range by end.")

        def render(scope: Scope) -> str:
            texts = []
            for pair in enumerate(items(scope)):
                inner = Scope(pair[1], scope)
                inner.values.update(zip(names, pair[-len(names) :] if names else (), strict=True))
                texts.append(body(inner))
            return "".join(texts)

        return render


def join(nodes: Sequence[Node]) -> Node:
    return lambda scope: "".join(node(scope) for node in nodes)


def split_actions(text: str) -> Iterator["str | list[Token]"]:
    """Texts, trimmed as the actions beside them say, and the tokens of the actions."""
    place = 0
    while opening := _OPEN.search(text, place):
        yield text[place : opening.start()]
        tokens, place = [], opening.end()
        while not (closing := _CLOSE.match(text, place)):
            match = _TOKEN.match(text, place)
            if match is None:
                raise GoTemplateError(
                    f"the template should be Go's, but it holds '{text[place : place + 20]}'."
                )
            tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            place = match.end()
        yield tokens
        place = closing.end()
    yield text[place:]


def parse_action(tokens: Tokens) -> Node:
    """An assignment, or an expression that is printed."""
    signs = [sign for kind, sign in tokens[1:2] if kind == "sign"]
    if signs and signs[0] in (":=", "="):
        name, value = tokens[0][1], parse_expression(tokens[2:])

        def assign(scope: Scope) -> str:
            target = scope.values if signs[0] == ":=" else scope.find(name)
            target[name] = value(scope)
            return ""

        return assign
    expression = parse_expression(tokens)
    return lambda scope: format_value(expression(scope))
