"""Tokenized pairs -> a torch `Dataset`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from dpo_wrapper.data.convert import convert_examples
from dpo_wrapper.data.errors import OnError, collect_errors
from dpo_wrapper.data.examples import DEFAULT_FIELDS, Fields, TokenizedExample, TokenizedExamples
from dpo_wrapper.data.readers import PathLike, read_examples
from dpo_wrapper.data.tokens.encode import tokenize_examples
from dpo_wrapper.data.tokens.encoded import Score
from dpo_wrapper.data.tokens.tokenizers import as_tokenizer


class PreferenceDataset(Dataset[dict[str, Any]]):
    """Pairs as dicts of tensors, named like the arguments of `DPO.forward`.

        preferred_seq: Int[n], unpreferred_seq: Int[n], prompt_mask: Bool[n], True on the prompt's tokens (one
        mask for each side, True on tokens that are not scored, if any pair says which tokens are scored),
    and, if any pair has them, pair_weights: Float[] (1 where a pair has none), margins: Float[] (0 there).

    The width `n` is that of the longer side or `pad_to`. The right is filled with `pad_id`, which may be -100
    or another id that is no token. A side that begins or ends with `pad_id` as a token is refused, so that a
    trailing run of `pad_id` is padding, all of it. With `pad_to` every item has the same width, and torch's
    default collate makes batches of them.

    From a file to the loss:

        dataset = PreferenceDataset.from_file("pairs.jsonl", tokenizer="bytes", max_length=256)
        loader = DataLoader(dataset, batch_size=8, collate_fn=PreferenceCollator(dataset.pad_id))
        for batch in loader:
            loss = dpo(**batch)

    `DataLoader(dataset.examples, collate_fn=dpo_wrapper.data.collate_preference)` gives `PreferenceBatch`es,
    for `dpo(batch)` and `dpo.normalize_over_step`.

    Args:
        examples: of two completions each, the better first.
        pad_id: the filler.
        pad_to: width of every item.

    Attributes:
        tokenized_examples: the examples of `from_file`, with counts of what was left out; else None.

    Raises:
        ValueError: an example is no pair, has a side without a token, or begins or ends a side with `pad_id`;
            or `pad_to` is below the longest side.
    """

    def __init__(
        self, examples: Sequence[TokenizedExample], pad_id: int, *, pad_to: int | None = None
    ) -> None:
        for example in examples:
            with collect_errors([], "raise", example.source):
                _check_pair(example, pad_id)
        longest = max(map(_width, examples), default=0)
        if pad_to is not None and pad_to < longest:
            problem = f"pad_to should be at least the longest side, {longest}, but it is {pad_to}"
            raise ValueError(f"{problem}: raise pad_to or tokenize with a smaller max_length.")
        self.examples = examples
        self.has_weights = any(example.weight is not None for example in examples)
        self.has_margins = any(example.margin is not None for example in examples)
        self.has_scored = any(example.scored is not None for example in examples)
        self.pad_id = pad_id
        self.pad_to = pad_to
        self.tokenized_examples: TokenizedExamples | None = None

    @classmethod
    def from_file(
        cls,
        paths: PathLike | Sequence[PathLike],
        tokenizer: Any = None,
        max_length: int = 512,
        fields: Fields = DEFAULT_FIELDS,
        on_error: OnError = "raise",
        pad_id: int | None = None,
        *,
        pad_to: int | None = None,
        score: Score | None = None,
        as_chat: bool | None = None,
        allow_empty: bool = False,
    ) -> "PreferenceDataset":
        """Read, tokenize and wrap the pairs of a file; a ranked list becomes all of its pairs.

        Args:
            paths, fields, on_error: as in `read_examples`.
            tokenizer: None or "bytes" for bytes, a tokenizer of transformers or of this package, or the name
                or folder of a model.
            max_length: tokens of prompt and completion.
            pad_id: the tokenizer's if None.
            pad_to: width of every item.
            score, as_chat, allow_empty: as in `tokenize_examples`.

        Raises:
            ValueError: whatever `read_examples`, `convert_examples` and `tokenize_examples` refuse; a
                `pad_id` that is EOS or BOS; no pair is left.
        """
        tokenizer = as_tokenizer(tokenizer)
        pad_id = tokenizer.pad_id if pad_id is None else pad_id
        if pad_id in (tokenizer.eos_id, tokenizer.bos_id):
            problem = f"pad_id should be neither EOS nor BOS, but it is {pad_id}, which hides real tokens"
            raise ValueError(f"{problem}: use -100, which is no token.")
        read = read_examples(paths, fields, on_error=on_error)
        examples, errors = read.examples, list(read.errors)
        examples, conversion_errors = convert_examples(examples, "preference", on_error=on_error)
        tokenized = tokenize_examples(
            examples,
            tokenizer,
            max_length,
            score=score,
            as_chat=as_chat,
            allow_empty=allow_empty,
            on_error=on_error,
        )
        errors += conversion_errors + tokenized.errors
        pairs = []
        for pair in tokenized.examples:
            with collect_errors(errors, on_error, pair.source):
                _check_pair(pair, pad_id)
                pairs.append(pair)
        tokenized = replace(tokenized, examples=pairs, errors=errors)
        if not pairs:
            remedy = f"the first error is '{errors[0]}'" if errors else "add rows whose completions differ"
            summary = tokenized.summary().removesuffix(".")
            raise ValueError(f"there should be pairs to train on, but there are none ({summary}): {remedy}.")
        dataset = cls(pairs, pad_id, pad_to=pad_to)
        dataset.tokenized_examples = tokenized
        return dataset

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        width = _width(example) if self.pad_to is None else self.pad_to
        sides = torch.full((2, width), self.pad_id, dtype=torch.long)
        for side, completion in zip(sides, example.completions, strict=True):
            ids = example.prompt + completion
            side[: len(ids)] = torch.tensor(ids)
        item: dict[str, Any] = {"preferred_seq": sides[0], "unpreferred_seq": sides[1]}
        item["prompt_mask"] = torch.arange(width) < len(example.prompt)
        if self.has_scored:
            item["prompt_mask"] = (torch.ones(width, dtype=torch.bool), torch.ones(width, dtype=torch.bool))
            for prompt_mask, scored in zip(item["prompt_mask"], example.scored_masks(), strict=True):
                prompt_mask[: len(scored)] = ~torch.tensor(scored)
        if self.has_weights:
            item["pair_weights"] = torch.tensor(1.0 if example.weight is None else example.weight)
        if self.has_margins:
            item["margins"] = torch.tensor(example.margin or 0.0)
        return item


def _width(example: TokenizedExample) -> int:
    return len(example.prompt) + max(map(len, example.completions))


def _check_pair(example: TokenizedExample, pad_id: int) -> None:
    if len(example.completions) != 2:
        problem = f"an example should be a pair, but it has {len(example.completions)} completion(s)"
        raise ValueError(f"{problem}: convert the examples with convert_examples(examples, 'preference').")
    for name, completion in (("chosen", example.chosen), ("rejected", example.rejected)):
        ids = example.prompt + completion
        if not ids:
            raise ValueError(f"the {name} sequence should have tokens, but it has none: leave the row out.")
        if pad_id in (ids[0], ids[-1]):
            end = "begin" if ids[0] == pad_id else "end"
            problem = f"the {name} sequence should not {end} with pad_id {pad_id}, but it is a token there"
            raise ValueError(f"{problem}: choose a pad_id that is no token, such as -100.")
