"""Tokenized pairs, and files of records, for tests."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.data import Example, PreferenceDataset, TokenizedExample, Tokenizer
from dpo_wrapper.data.tokens import encode
from dpo_wrapper.data.tokens.options import TokenizeOptions


def pairs(count: int = 7, seed: int = 0) -> list[TokenizedExample]:
    """Random pairs of prompts and completions of 1 to 4 ids below 37."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> tuple[int, ...]:
        n = int(torch.randint(1, 5, (), generator=generator))
        return tuple(torch.randint(37, (n,), generator=generator).tolist())

    return [TokenizedExample(ids(), (ids(), ids())) for _ in range(count)]


def dataset(examples: list[TokenizedExample] | None = None) -> PreferenceDataset:
    return PreferenceDataset(pairs() if examples is None else examples, -100)


def tokenize_example(example: Example, tokenizer: Tokenizer, max_length: int) -> TokenizedExample:
    row = encode.fit_row(example, tokenizer, TokenizeOptions(max_length=max_length))
    (tokenized,) = row.examples
    return tokenized


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
