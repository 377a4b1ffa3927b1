"""Expressions of Go's templates: values, fields, variables and calls of functions."""

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda one, *others: any(one == other for other in others),
    "ne": lambda one, other: one != other,
    "gt": lambda one, other: one > other,
    "lt": lambda one, other: one < other,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "len": len,
    "index": lambda items, place: items[place],
    "slice": lambda items, *bounds: items[slice(*bounds)] if len(bounds) > 1 else items[bounds[0] :],
}


class GoTemplateError(ValueError):
    """A template that Go would refuse, or that needs more of its language than this knows."""


class Scope:
    """The variables of a block, and those of the blocks around it."""

    def __init__(self, dot: Any, outer: "Scope | None" = None) -> None:
        self.dot, self.outer, self.values = dot, outer, dict[str, Any]()

    def find(self, name: str) -> dict[str, Any]:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values
            scope = scope.outer
        raise GoTemplateError(f"the template should declare {name} before it is used, but it does not.")


Token = tuple[str, str]
"""Its kind and its text."""

Tokens = Sequence[Token]
Expression = Callable[[Scope], Any]


def parse_expression(tokens: Tokens) -> Expression:
    """A value, or a function with its arguments."""
    operands, rest = parse_operands(tokens)
    if rest or not operands:
        raise GoTemplateError(f"the template should hold expressions, but one is '{words(tokens)}'.")
    if tokens[0][0] != "name" or tokens[0][1] in ("true", "false"):
        if len(operands) > 1:
            raise GoTemplateError(f"the template should call functions, but '{words(tokens)}' calls none.")
        return operands[0]
    function, arguments = operands[0], operands[1:]
    if not arguments:
        raise GoTemplateError(f"{tokens[0][1]} should have arguments, but the template gives it none.")
    return lambda scope: function(scope)(*(argument(scope) for argument in arguments))


def parse_operands(tokens: Tokens) -> tuple[list[Expression], Tokens]:
    """The values that stand beside one another, up to the end or to a closing parenthesis."""
    operands: list[Expression] = []
    while tokens and tokens[0] != ("sign", ")"):
        (kind, text), tokens = tokens[0], tokens[1:]
        if (kind, text) == ("sign", "("):
            inner, after = parse_operands(tokens)
            if not after:
                raise GoTemplateError("the template should close each parenthesis, but one is open.")
            value = parse_expression(tokens[: len(tokens) - len(after)])
            tokens = after[1:]
            if tokens and tokens[0][0] == "path" and tokens[0][1].startswith(".") and inner:
                value, tokens = read_fields(value, tokens[0][1]), tokens[1:]
            operands.append(value)
        else:
            operands.append(parse_operand(kind, text))
    return operands, tokens


def parse_operand(kind: str, text: str) -> Expression:
    if kind == "string":
        return constant(read_string(text))
    if kind == "number":
        return constant(int(text))
    if kind == "path":
        name, *fields = text.split(".")
        if not name:
            return read_fields(lambda scope: scope.dot, text)
        return read_fields(lambda scope: scope.find(name)[name], "." + ".".join(fields))
    if text in ("true", "false"):
        return constant(text == "true")
    if text not in FUNCTIONS:
        raise GoTemplateError(f"the template should call functions of Go, but it calls '{text}'.")
    return constant(FUNCTIONS[text])


def read_string(text: str) -> str:
    try:
        return str(ast.literal_eval(text))  # Go's escapes are Python's, too
    except (SyntaxError, ValueError) as error:
        raise GoTemplateError(f"the template should hold strings of Go, but one is {text}.") from error


def read_fields(value: Expression, path: str) -> Expression:
    fields = [name for name in path.split(".") if name]

    def read(scope: Scope) -> Any:
        result = value(scope)
        for name in fields:
            result = result.get(name) if isinstance(result, Mapping) else getattr(result, name)
        return result

    return read


def constant(value: Any) -> Expression:
    return lambda scope: value


def words(tokens: Tokens) -> str:
    return " ".join(text for _, text in tokens)


def format_value(value: Any) -> str:
    if value is None:
        return "<no value>"
    return str(value).lower() if isinstance(value, bool) else str(value)
