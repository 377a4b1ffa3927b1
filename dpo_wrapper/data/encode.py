"""Rows to pairs of token sequences of bounded length."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from .files import OnError, check_on_error
from .rows import Row, RowError
from .tokenizers import Tokenizer
from .turns import Message

MIN_LENGTH = 8


@dataclass(frozen=True)
class TokenPair:
    """The ids of one pair. Both sides continue the same prompt; a side's sequence is prompt + completion.

    prompt: Int[k], chosen: Int[i], rejected: Int[j]; the tokens of chosen and rejected are the scored ones.
    weight, margin: what the row says of the pair's loss, or None.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    where: str = ""
    weight: float | None = None
    margin: float | None = None

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        return (self.chosen, self.rejected)

    @property
    def wanted(self) -> tuple[int, ...]:
        return self.chosen


@dataclass(frozen=True)
class TokenList:
    """The ids of a ranked list, the best first, or, with a label, of one completion.

    All continue the same prompt. mismatched: the completion of another prompt, for rows with a label.
    """

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    label: bool | None = None
    where: str = ""
    weight: float | None = None
    mismatched: tuple[int, ...] = ()

    @property
    def wanted(self) -> tuple[int, ...] | None:
        """The best completion, or the one; None where it is not wanted."""
        return None if self.label is False else self.completions[0]


Entry = TokenPair | TokenList
E = TypeVar("E", TokenPair, TokenList)


@dataclass(frozen=True)
class EncodedRows(Generic[E]):
    """Pairs (lists, rows with a label), and what became of the rows that are not among them.

    identical: entries left out because all sides are the same tokens: nothing is preferred.
    empty: entries left out because a side has no scored token; a list needs two that have.
    prompts_shortened: kept entries whose prompt lost its beginning.
    completions_cut: completions of kept entries that lost their end.
    errors: of the rows that were skipped.
    """

    entries: list[E]
    identical: int = 0
    empty: int = 0
    prompts_shortened: int = 0
    completions_cut: int = 0
    errors: list[RowError] = field(default_factory=list)

    def summary(self) -> str:
        """One sentence on what was left out or shortened; empty if nothing was."""
        rows = len(self.entries) + self.identical + self.empty + len(self.errors)
        left_out = [
            (len(self.errors), "with an error"),
            (self.identical, "with the same tokens on both sides"),
            (self.empty, "with nothing to score"),
        ]
        cut = [
            (self.prompts_shortened, "prompt", "at the front"),
            (self.completions_cut, "completion", "at the end"),
        ]
        out = ", ".join(f"{count:,} {why}" for count, why in left_out if count)
        fit = ", ".join(f"{count:,} {what}{'s' * (count > 1)} {end}" for count, what, end in cut if count)
        clauses = [f"left out of {rows:,} rows: {out}"] * bool(out) + [f"cut to fit: {fit}"] * bool(fit)
        return (text[0].upper() + text[1:] + ".") if (text := "; ".join(clauses)) else ""


def encode_row(row: Row, tokenizer: Tokenizer, max_length: int) -> TokenPair:
    """The pair of a row, each side at most `max_length` tokens long.

    What is too long loses tokens from the front of the prompt first (BOS stays), down to a quarter of
    `max_length`; then from the ends of the completions, whose EOS is not put back: they did not end there.

    ValueError for `max_length` below 8 and for text that the tokenizer refuses.
    """
    return _encode(row, tokenizer, max_length).entry


class Encoded(NamedTuple):
    """An entry, whether its prompt was shortened, and how many of its completions were cut."""

    entry: Any
    shortened: bool
    cut: int


def _encode(row: Row, tokenizer: Tokenizer, max_length: int) -> Encoded:
    found = encode_completions(row.prompt, (row.chosen, row.rejected), tokenizer, max_length)
    prompt, (chosen, rejected) = found.entry
    return found._replace(entry=TokenPair(prompt, chosen, rejected, row.where, row.weight, row.margin))


def encode_completions(
    prompt: str | tuple[Message, ...], completions: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> Encoded:
    """One prompt and all of its completions, shortened as in `encode_row`."""
    check_max_length(max_length)
    whole = tokenizer.prompt_ids(prompt)
    sides = [tokenizer.completion_ids(prompt, text) for text in completions]
    room = max_length - max(len(side) for side in sides)
    # Never above the prompt's own length; and a long completion may not push the prompt out altogether.
    keep = min(len(whole), max(room, max_length // 4))
    cut = tuple(tuple(side[: max_length - keep]) for side in sides)
    shorter = sum(len(a) < len(b) for a, b in zip(cut, sides, strict=True))
    return Encoded((tuple(_last_tokens(whole, keep, tokenizer.bos_id)), cut), keep < len(whole), shorter)


def _last_tokens(prompt: list[int], keep: int, bos_id: int | None) -> list[int]:
    """The last `keep` tokens (1 or more), the first of them replaced by the BOS the prompt begins with."""
    if len(prompt) <= keep:
        return prompt
    last = prompt[-keep:]
    return [bos_id, *last[1:]] if bos_id is not None and prompt[0] == bos_id else last


def check_max_length(max_length: int) -> None:
    """ValueError for a length below 8, which leaves no room for a prompt and an answer."""
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < MIN_LENGTH:
        remedy = "choose how many tokens prompt and completion may have together"
        raise ValueError(
            f"expected max_length to be an integer from {MIN_LENGTH}, got {max_length!r}; {remedy}"
        )


def encode_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, max_length: int, *, on_error: OnError = "raise"
) -> EncodedRows[TokenPair]:
    """The pairs of all rows, without those that teach nothing, and counts of what happened to them.

    on_error: 'raise' raises the tokenizer's first error as a RowError that starts with the row's place;
    'skip' collects them in `errors`.
    """
    check_max_length(max_length)
    return collect(rows, lambda row: _encode(row, tokenizer, max_length), on_error)


def collect(rows: Iterable[Any], encode: Callable[[Any], Encoded], on_error: OnError) -> EncodedRows[Any]:
    """What `encode` makes of all rows, as `encode_rows` says."""
    check_on_error(on_error)
    kept: list[Encoded] = []
    errors: list[RowError] = []
    identical = empty = 0
    for row in rows:
        try:
            found = encode(row)
        except ValueError as error:
            placed = RowError(f"{row.where}: {error}" if row.where else str(error))
            if on_error == "raise":
                raise placed from error
            errors.append(placed)
            continue
        completions = found.entry.completions
        scored = sum(len(completion) > (0 if found.entry.prompt else 1) for completion in completions)
        if len(completions) > 1 and len(set(completions)) == 1:
            identical += 1
        elif scored < min(2, len(completions)):  # the first token of a sequence never is scored
            empty += 1
        else:
            kept.append(found)
    shortened, cut = sum(found.shortened for found in kept), sum(found.cut for found in kept)
    return EncodedRows([found.entry for found in kept], identical, empty, shortened, cut, errors)
