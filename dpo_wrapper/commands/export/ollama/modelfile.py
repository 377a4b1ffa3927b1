"""Modelfiles, as Ollama reads them."""

import re
from dataclasses import dataclass

from dpo_wrapper.commands.export.ollama.template import is_kept

_LINE = re.compile(
    r'\s*(FROM|ADAPTER|TEMPLATE|SYSTEM|PARAMETER stop) (?:"""(.*?)"""[ \t]*(?:\n|$)|([^\n]*)(?:\n|$))',
    re.DOTALL,
)
"""A command: its text in three quotes ends with the first three at the end of a line."""


@dataclass(frozen=True)
class Modelfile:
    """The lines of a Modelfile.

    Attributes:
        base: the GGUF file of the model, as an absolute path or one from the Modelfile's folder.
        template: the TEMPLATE.
        stops: texts at which an answer ends.
        system: the default system message; empty for none.
        adapter: the GGUF file of the adapter; empty for none.
    """

    base: str
    template: str
    stops: tuple[str, ...]
    system: str = ""
    adapter: str = ""

    def format(self) -> str:
        """The text of the file.

        Raises:
            ValueError: a value cannot be written so that Ollama reads it back.
        """
        for text in (self.base, self.template, self.system, self.adapter, *self.stops):
            if not can_hold(text):
                raise ValueError(
                    f"a text of a Modelfile should be one that Ollama reads back, but {text!r} holds "
                    "characters that it drops, or three quotes at the end of a line: write the Modelfile by "
                    "hand."
                )
        lines = [f"FROM {quote(self.base)}"]
        if self.adapter:
            lines.append(f"ADAPTER {quote(self.adapter)}")
        lines.append(f'TEMPLATE """{self.template}"""')
        if self.system:
            lines.append(f'SYSTEM """{self.system}"""')
        lines += [f"PARAMETER stop {quote(stop)}" for stop in self.stops]
        return "\n".join(lines) + "\n"


def can_hold(text: str) -> bool:
    """Whether a Modelfile can have a text as a value."""
    is_kept_whole = all(one in "\n\t" or is_kept(one) for one in text)
    return is_kept_whole and re.search(r'"""[ \t]*\n', text) is None


def quote(text: str) -> str:
    """A text of any kind as the value of a command, or one of a single line as it is."""
    is_plain = text == text.strip() and "\n" not in text and not text.startswith('"')
    return text if is_plain else f'"""{text}"""'


def parse_modelfile(text: str) -> Modelfile:
    """The values of a Modelfile with these commands; ValueError for another.

    As Ollama does, this drops characters that cannot be printed, but for white space within a value.
    """
    values: dict[str, list[str]] = {}
    place = 0
    while text[place:].strip():
        match = _LINE.match(text, place)
        if match is None:
            found = text[place : place + 40].strip()
            raise ValueError(f"the Modelfile should hold the commands of an export, but it holds '{found}'.")
        value = match[2] if match[2] is not None else match[3].strip()
        kept = "".join(one for one in value if one in "\n\r\t" or is_kept(one))
        values.setdefault(match[1], []).append(kept)
        place = match.end()

    def take(name: str) -> str:
        return values.get(name, [""])[-1]

    stops = tuple(values.get("PARAMETER stop", ()))
    return Modelfile(take("FROM"), take("TEMPLATE"), stops, take("SYSTEM"), take("ADAPTER"))
