"""The pairs of some data that a model is evaluated on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.data import Example, TokenizedExample, Tokenizer
from dpo_wrapper.data.config import DataConfig, flag
from dpo_wrapper.data.example_table import ExampleTable
from dpo_wrapper.data.example_view import PREFERENCE, RANKED, view_preferences
from dpo_wrapper.data.input_data import InputData
from dpo_wrapper.data.prepared import PreparedData, is_prepared
from dpo_wrapper.data.split import split_rows
from dpo_wrapper.data.trained_prompts import PromptDigests
from dpo_wrapper.pretrained import read_run

TRAINED_NOTE = "the run was trained on these rows: their figures are not those of new ones."

RUN_OPTIONS = ("max_length", "max_prompt_length", "on_long", "score", "as_chat", "allow_empty")
"""Options of tokens that are as in the run unless they are given."""


@dataclass(frozen=True)
class EvalPairs:
    """Pairs as tokens, and what is known of their rows.

    Attributes:
        examples: `n` examples of two completions, the chosen one first.
        table: of all examples of the data.
        prompt_digests: Int[n], equal for pairs of one prompt.
        subsets: of each pair, the part of a benchmark that it belongs to, or None.
        originals: of each pair the row as text; empty where the data was prepared.
        notes: sentences on what was left out, cut or not used.
    """

    examples: Sequence[TokenizedExample]
    table: ExampleTable
    prompt_digests: NDArray[np.int64]
    subsets: list[str | None]
    originals: list[Example]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.examples)


def take_run_options(config: DataConfig, run: Mapping[str, Any]) -> tuple[DataConfig, list[str]]:
    """The settings with options of tokens as in the run, where they are left at their defaults."""
    settings, defaults = run.get("settings", {}), type(config)
    taken = {
        name: settings[name]
        for name in RUN_OPTIONS
        if config.__dataclass_fields__[name].init
        and getattr(config, name) == getattr(defaults, name) != settings.get(name, getattr(defaults, name))
    }
    words = " ".join(f"{flag(name)} {value}" for name, value in taken.items())
    return replace(config, **taken), [f"as in the run: {words}."] if taken else []


def take_options_of_tokens(config: EvaluateConfig) -> tuple[DataConfig, list[str]]:
    """The settings with options of tokens as in the run, or as prepared data has them, and a sentence."""
    if prepared := next(filter(is_prepared, config.data), None):
        return take_run_options(config, {"settings": PreparedData.open(prepared).manifest["options"]})[0], []
    return take_run_options(config, read_run(Path(config.model)))


def hide_subset(data: InputData, config: DataConfig) -> InputData:
    """The data without a note that the column of subsets is not used, which reading alone does not."""
    if data.read is None:
        return data
    unused, column = data.read.unused_columns.copy(), config.fields.subset
    unused.pop(column, None)
    return replace(data, read=replace(data.read, unused_columns=unused))


def select_pairs(
    data: InputData,
    tokenizer: Tokenizer,
    config: DataConfig,
    run: Mapping[str, Any],
    trained_prompts: PromptDigests | None,
) -> EvalPairs:
    """The pairs to evaluate on: rows that are marked as test, or else all, without those trained on.

    Args:
        data: what --data names.
        tokenizer: the model's.
        config: how rows become tokens.
        run: the content of run.json; empty for a model that is no run.
        trained_prompts: what `read_trained_prompts` says of the model.

    Raises:
        ValueError: the tokenizer refuses a row, or there is no pair.
    """
    tokenized = data.tokenize(tokenizer, config, says_cuts=False)
    table, notes = tokenized.table, list(tokenized.notes)
    rows, split_notes = select_rows(table, config, run, trained_prompts)
    types = table.dataset_types[rows]
    is_pair = (types == PREFERENCE) | (types == RANKED)
    if count := int((~is_pair).sum()):
        split_notes.append(f"{count:,} rows are left out, for they have no two completions to compare.")
    pairs, errors = view_preferences(table, rows[is_pair], "preference", on_error=config.on_error)
    if errors:
        split_notes.append(f"{len(errors):,} rows are left out; the first: {errors[0]}")
    notes += split_notes
    if not len(pairs):
        names = ", ".join(map(str, config.data))
        said = f" ({' '.join(notes)})" if notes else ""
        raise ValueError(
            f"--data should hold pairs to evaluate on, but {names} has none{said}: add rows with 'chosen' "
            "and 'rejected'."
        )
    if count := int(table.column("is_cut")[pairs.rows].sum()):
        notes.append(f"Cut to the maximum length: {count:,} of {len(pairs):,} pairs.")
    originals = [tokenized.originals[tokenized.origins[row]] for row in pairs.rows] if data.read else []
    digests = table.column("prompt_digest")[pairs.rows].astype(np.uint64).view(np.int64)
    subsets = [example.subset for example in originals] or [None] * len(pairs)
    return EvalPairs(list(pairs), table, digests, subsets, originals, notes)


def select_rows(
    table: ExampleTable, config: DataConfig, run: Mapping[str, Any], trained_prompts: PromptDigests | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Indices of the rows to evaluate on, and sentences on the choice; arguments as in `select_pairs`."""
    rows, notes = np.arange(len(table)), []
    is_test = table.column("split") == "test"
    if is_test.any():
        rows = np.flatnonzero(is_test)
        if left_out := len(table) - len(rows):
            notes.append(f"{left_out:,} rows are left out, for they are not marked as test, as others are.")
    elif trained_prompts is None and run.get("settings"):
        trained_prompts, notes = find_trained_prompts(table, config, run["settings"])
    if trained_prompts is None:
        return rows, notes
    is_new = ~np.isin(table.column("prompt_digest")[rows], trained_prompts)
    if len(rows) and not is_new.any():
        return rows, [*notes, TRAINED_NOTE]
    if left_out := int((~is_new).sum()):
        notes.append(
            f"{left_out:,} rows are left out, for their prompts are in the training data of the run."
        )
    return rows[is_new], notes


def find_trained_prompts(
    table: ExampleTable, config: DataConfig, settings: Mapping[str, Any]
) -> tuple[PromptDigests | None, list[str]]:
    """The prompts of a run that has no file of them, where its data is named; else None, and a sentence.

    Its rows are split as it did.
    """
    if not names_same_data(config.data, settings["data"]):
        sentence = (
            "rows that the run was trained on are not told apart here: they are where --data names just what "
            f"the run did ({' '.join(settings['data'])})."
        )
        return None, [] if settings.get("eval_data") else [sentence]
    splits, digests = (table.column(name) for name in ("split", "prompt_digest"))
    fraction = settings["eval_fraction"]
    if settings.get("eval_data") or any(splits) or not fraction:
        return digests, []
    seed = settings["seed"] if settings.get("split_seed") is None else settings["split_seed"]
    train, _ = split_rows(splits.tolist(), digests.tolist(), fraction, seed)
    return digests[train], []


def names_same_data(paths: Sequence[Path], others: Sequence[str]) -> bool:
    """Whether some names are those of the data of a run."""
    return {str(path.resolve()) for path in paths} == {str(Path(other).resolve()) for other in others}
