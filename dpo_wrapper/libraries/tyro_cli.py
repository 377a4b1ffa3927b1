"""Command lines that tyro reads; what it says in a box of what it cannot read, as one sentence."""

import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

OPTION = re.compile(r"^ {4}(?:--[\w-]+, )*(--[\w-]+|[A-Z]+)(?= |$)", re.MULTILINE)
"""An option of tyro's lists, by its last name, or the placeholder of an argument without one."""

NUMBER = re.compile(r"^ {4}--.*[ |](INT|FLOAT)$", re.MULTILINE)
"""An option that takes a number."""


def parse_command_line(config_class: type[Any], program: str, args: Sequence[str], **options: Any) -> Any:
    """What `tyro.cli` gives.

    Raises:
        SystemExit: help was asked for.
        ValueError: the arguments cannot be read.
    """
    import tyro

    printed = StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(config_class, prog=program, args=args, **options)
    except SystemExit as exit_:
        if not exit_.code:
            raise
    raise ValueError(explain_box(printed.getvalue(), program))


def explain_box(box: str, program: str) -> str:
    """A sentence on what tyro says in a box, whose sections are a line apart.

    Below the title a line begins with `│ `, or with blanks where the terminal has no such characters.
    """
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()[1:]
    content = "\n".join(line[2:].rstrip(" │") for line in lines)
    missing, unknown, similar, kinds, message = [], [], [], [], ""
    for section in re.split(r"^[─-]+╯?$", content, flags=re.MULTILINE):
        names, text = OPTION.findall(section), " ".join(section.strip().partition("\n\n")[0].split())
        if text.startswith("Missing from"):
            missing += names
        elif text.startswith("Unrecognized options: "):
            unknown += re.split(r",? ", text.partition(": ")[2])
        elif text.startswith(("Perhaps you meant", "Arguments similar to")):
            similar += names
        elif text.startswith("Argument helptext"):
            kinds = NUMBER.findall(section)
        elif not text.startswith("For full helptext"):
            message = f"{message} {text}".strip()
    if missing or unknown:
        unknown = [name for name in unknown if name.startswith("-")] or unknown
        problems = [f"there is {', '.join(unknown)}"] * bool(unknown)
        problems += [f"there is no {' and no '.join(missing)}"] * bool(missing)
        remedy = f"did you mean {' or '.join(similar)}? See" if similar else "see"
        sentence = f"the options should be those of {program}, but {' and '.join(problems)}"
        return f"{sentence}: {remedy} {program} --help."
    if match := re.search(r"^invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", message):
        known = [name for name in re.split(r"[', ]+", match[3]) if name not in ("", "None")]
        problem = f"{match[2]} should be one of {', '.join(known)}, but it is {match[1] or 'empty'}"
        return f"{problem}: choose one of them."
    if match := re.search(r"^Missing value for argument '(\w.*)'", message):
        problem = f"{match[1]} should stand in front of all options, without a name, but it is not there"
        return f"{problem}: see {program} --help."
    if match := re.search(r"^Missing value for argument '(.*)'", message):
        return f"{match[1]} should have a value, but it has none: give one, or leave it out."
    message = re.sub(r"^Error parsing (\w+: )?", "", message)
    if kinds and (values := re.findall(r"'([^']*)'", message)):
        name = message.partition(":")[0].rpartition("/")[2]
        number = "an integer" if kinds == ["INT"] else "a number"
        return f"{name} should be {number}, but it is {values[-1] or 'empty'}: give another value."
    return message if ": " in message else f"{message.rstrip('.')}: see {program} --help."
