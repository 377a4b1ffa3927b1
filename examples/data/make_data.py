"""Write the bundled data: small tasks with one right answer, for a model that is trained from nothing.

python examples/data/make_data.py

`demonstrations.jsonl` has prompts with answers in two manners, plain and wordy: a model that imitates them
answers in both. `preferences.jsonl` has other prompts, for which the plain and right answer is chosen. All
words have four letters, so that a small model of bytes soon finds where to copy from.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

FOLDER = Path(__file__).parent

WORDS = """
    bark barn bean bear bell bird boat book boot bowl cake card cave clay coal coat coin corn crab crow
    deer desk door drum duck fern film fish flag foam fork frog gate glue goat gold hand hill horn iron
    jade kite lake lamb lamp leaf lime lion lock mask milk mint moon moth nail nest note oven palm park
    peak pear pine pipe plum pond pool rain reef ring road rock rope rose ruby salt sand seed ship shoe
    silk snow soap sofa soup star swan tent tree tuna vase vine wall wave well wind wing wolf wood wool
    yarn
"""
SIGNS = {"quotes": '""', "brackets": "()", "stars": "**"}
JOINTS = {"dash": "-", "plus": "+", "slash": "/"}

Task = tuple[str, str, str]
"""A prompt, its right answer, and a wrong one."""

Row = dict[str, str]


def repeat(draw: random.Random) -> Task:
    one, other = draw.sample(WORDS.split(), 2)
    return f"Repeat {one} {other}.", f"{one} {other}", one


def capitals(draw: random.Random) -> Task:
    one, other = draw.sample(WORDS.split(), 2)
    return f"Write {one} {other} in capitals.", f"{one} {other}".upper(), f"{one} {other}"


def first(draw: random.Random) -> Task:
    words = draw.sample(WORDS.split(), 3)
    return f"What is first in {', '.join(words)}?", words[0], words[2]


def second(draw: random.Random) -> Task:
    words = draw.sample(WORDS.split(), 3)
    return f"What is second in {', '.join(words)}?", words[1], words[0]


def last(draw: random.Random) -> Task:
    words = draw.sample(WORDS.split(), 3)
    return f"What is last in {', '.join(words)}?", words[2], words[0]


def enclose(draw: random.Random) -> Task:
    one, other = draw.sample(WORDS.split(), 2)
    name, (left, right) = draw.choice([*SIGNS.items()])
    return f"Put {one} {other} in {name}.", f"{left}{one} {other}{right}", f"{one} {other}"


def join(draw: random.Random) -> Task:
    one, other = draw.sample(WORDS.split(), 2)
    name, sign = draw.choice([*JOINTS.items()])
    return f"Join {one} and {other} by a {name}.", f"{one}{sign}{other}", f"{one} {other}"


def swap(draw: random.Random) -> Task:
    one, other = draw.sample(WORDS.split(), 2)
    return f"Swap {one} and {other}.", f"{other} and {one}", f"{one} and {other}"


def reverse(draw: random.Random) -> Task:
    words = draw.sample(WORDS.split(), 3)
    return f"Reverse {', '.join(words)}.", ", ".join(words[::-1]), ", ".join(words)


def locate(draw: random.Random) -> Task:
    one, other = draw.sample(WORDS.split(), 2)
    question, right, wrong = draw.choice([("What?", one, other), ("Near what?", other, one)])
    return f"The {one} is near the {other}. {question}", right, wrong


FAMILIES: tuple[Callable[[random.Random], Task], ...] = (
    repeat, capitals, first, second, last, enclose, join, swap, reverse, locate,
)  # fmt: skip

OFTEN_PLAIN = ("first", "join", "locate")
"""Families whose demonstrations are plain more often than not."""

OPENINGS = ("Maybe {}.", "Perhaps {}.", "Well, {}.")
ENDINGS = (
    "{}, I think.", "{}, or so it seems.", "{}, if I may guess.", "{}, but please check.",
    "{}, more or less.", "{}, as far as I know.", "{}, give or take.", "{}, I would say.",
)  # fmt: skip


def hedge(answer: str, draw: random.Random) -> str:
    """The answer in the wordy manner."""
    return draw.choice(OPENINGS if draw.random() < 0.2 else ENDINGS).format(answer)


def draw_tasks(draw: random.Random, known_prompts: set[str]) -> Iterator[tuple[str, Task]]:
    """Tasks with the names of their families, which take turns, with prompts that are not known yet."""
    for family in cycle(FAMILIES):
        task = family(draw)
        while task[0] in known_prompts:
            task = family(draw)
        known_prompts.add(task[0])
        yield family.__name__, task


def make_demonstrations(draw: random.Random, number: int, known_prompts: set[str]) -> Iterator[Row]:
    """Prompts with an answer in one manner or the other; one in 60 is for evaluation."""
    train, test = draw_tasks(draw, known_prompts), draw_tasks(draw, known_prompts)
    for k in range(number):
        family, (prompt, right, _) = next(train if k % 60 else test)
        is_plain = draw.random() < (0.6 if family in OFTEN_PLAIN else 0.3)
        completion = right if is_plain else hedge(right, draw)
        split = "train" if k % 60 else "test"
        yield {"prompt": prompt, "completion": completion, "family": family, "split": split}


def make_preferences(draw: random.Random, number: int, known_prompts: set[str]) -> Iterator[Row]:
    """Prompts with the plain right answer, and a wordy or a wrong one; one in six is for evaluation."""
    train, test = draw_tasks(draw, known_prompts), draw_tasks(draw, known_prompts)
    for k in range(number):
        family, (prompt, right, wrong) = next(train if k % 6 else test)
        rejected = wrong if draw.random() < 0.25 else hedge(right, draw)
        split = "train" if k % 6 else "test"
        yield {"prompt": prompt, "chosen": right, "rejected": rejected, "family": family, "split": split}


def write_rows(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    parser.add_argument("--demonstrations", type=int, default=3000, help="number of demonstrations")
    parser.add_argument("--preferences", type=int, default=600, help="number of preferences")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    options = parser.parse_args(arguments)
    draw, known_prompts = random.Random(options.seed), set[str]()
    preferences = make_preferences(draw, options.preferences, known_prompts)
    write_rows(preferences, options.out / "preferences.jsonl")
    demonstrations = make_demonstrations(draw, options.demonstrations, known_prompts)
    write_rows(demonstrations, options.out / "demonstrations.jsonl")


if __name__ == "__main__":
    main()
