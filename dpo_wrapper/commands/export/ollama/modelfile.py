"""Modelfiles, as Ollama reads them."""

import re
from dataclasses import dataclass

from dpo_wrapper.commands.export.ollama.template import is_kept


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
        lines = [f"FROM {self.base}"]
        if self.adapter:
            lines.append(f"ADAPTER {self.adapter}")
        lines.append(f'TEMPLATE """{self.template}"""')
        if self.system:
            lines.append(f'SYSTEM """{self.system}"""')
        lines += [
            f'PARAMETER stop """{stop}"""' if needs_quotes(stop) else f"PARAMETER stop {stop}"
            for stop in self.stops
        ]
        text = "\n".join(lines) + "\n"
        if parse_modelfile(text) != self:
            raise ValueError(
                "the texts of a Modelfile should be such that Ollama reads them back, but one of them holds "
                "characters that it drops or three quotes at the end of a line: write the Modelfile by hand."
            )
        return text


def needs_quotes(text: str) -> bool:
    return text != text.strip() or "\n" in text or text.startswith('"')


def parse_modelfile(text: str) -> Modelfile:
    """The values of a Modelfile of this kind; ValueError if it is none.

    As Ollama does, this drops characters that cannot be printed, but for white space within a value.
    """
    values: dict[str, list[str]] = {}
    place = 0
    line = re.compile(
        r'\s*(\w+)[ \t]+(?:stop[ \t]+)?(?:"""(.*?)"""[ \t]*(?:\n|$)|([^\n]*)(?:\n|$))', re.DOTALL
    )
    while text[place:].strip():
        match = line.match(text, place)
        if match is None:
            raise ValueError(
                f"the Modelfile should hold commands, but it holds '{text[place : place + 20]}'."
            )
        value = match[2] if match[2] is not None else match[3].strip()
        kept = "".join(one for one in value if one in "\n\r\t" or is_kept(one))
        values.setdefault(match[1].upper(), []).append(kept)
        place = match.end()

    def take(name: str) -> str:
        return values.get(name, [""])[-1]

    return Modelfile(
        take("FROM"), take("TEMPLATE"), tuple(values.get("PARAMETER", ())), take("SYSTEM"), take("ADAPTER")
    )
