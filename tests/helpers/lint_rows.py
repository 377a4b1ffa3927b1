"""Rows for the checks of a data set, and what is found in them."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from dpo_wrapper.data import ByteTokenizer, Example, TokenizedExample
from dpo_wrapper.data.lint import Finding, find_problems, measure_rows

BYTES = ByteTokenizer()
WORDS = [first + last for first in "bdfghklmnprstvz" for last in ("alo", "emi", "iru", "osta", "unde")]


def tokenize(example: Example) -> TokenizedExample:
    encoded = BYTES.encode_example(example.prompt, example.completions)
    prompt, completions = tuple(encoded.prompt), tuple(map(tuple, encoded.completions))
    if example.is_document:
        return TokenizedExample((), completions, is_document=True, source=example.source)
    return TokenizedExample(prompt, completions, example.label, source=example.source)


def measure(examples: Iterable[Example]) -> dict[str, np.ndarray]:
    return measure_rows([(example, (tokenize(example),)) for example in examples])


def write_words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choices(WORDS, k=count))


def make_pairs(count: int, seed: int = 0) -> list[Example]:
    """Pairs of which nothing can be said: random words, all of 12 words a side."""
    generator = random.Random(seed)
    texts = [[write_words(generator, length) for length in (6, 12, 12)] for _ in range(count)]
    return [Example(prompt, (chosen, rejected)) for prompt, chosen, rejected in texts]


def label_rows(examples: Sequence[Example], num_desirable: int) -> list[Example]:
    return [
        Example(example.prompt, example.completions[:1], label=index < num_desirable)
        for index, example in enumerate(examples)
    ]


def change(
    examples: list[Example], rows: Iterable[int], chosen: str = "{}", rejected: str = "{}"
) -> list[Example]:
    """The pairs, with another text around the sides of some rows."""
    result = list(examples)
    for row in rows:
        sides = zip((chosen, rejected), result[row].completions, strict=True)
        result[row] = replace(result[row], completions=tuple(form.format(text) for form, text in sides))
    return result


def find(examples: Iterable[Example], name: str, **counts: int) -> Finding | None:
    return pick(find_problems(measure(examples), counts), name)


def pick(findings: Iterable[Finding], name: str) -> Finding | None:
    found = [finding for finding in findings if finding.name == name]
    assert len(found) < 2
    return found[0] if found else None


def is_problem(finding: Finding | None) -> bool:
    return finding is not None and finding.is_problem
