"""Rows to pairs of token sequences of bounded length."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class EncodedRows:
    """Pairs, and what became of the rows that are not among them.

    identical: pairs left out because both sides are the same tokens: nothing is preferred.
    empty: pairs left out because a side has no scored token.
    prompts_shortened: kept pairs whose prompt lost its beginning.
    completions_cut: completions of kept pairs that lost their end.
    errors: of the rows that were skipped.
    """

    pairs: list[TokenPair]
    identical: int = 0
    empty: int = 0
    prompts_shortened: int = 0
    completions_cut: int = 0
    errors: list[RowError] = field(default_factory=list)

    def summary(self) -> str:
        """One sentence on what was left out or shortened; empty if nothing was."""
        rows = len(self.pairs) + self.identical + self.empty + len(self.errors)
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
    return _encode(row, tokenizer, max_length)[0]


def _encode(row: Row, tokenizer: Tokenizer, max_length: int) -> tuple[TokenPair, bool, int]:
    """The pair, whether its prompt was shortened, and how many of its completions were cut."""
    check_max_length(max_length)
    prompt = tokenizer.prompt_ids(row.prompt)
    sides = [tokenizer.completion_ids(row.prompt, text) for text in (row.chosen, row.rejected)]
    kept, cut = _cut(prompt, sides, tokenizer, max_length)
    pair = TokenPair(tuple(kept), tuple(cut[0]), tuple(cut[1]), row.where, row.weight, row.margin)
    return pair, len(kept) < len(prompt), sum(a != b for a, b in zip(sides, cut, strict=True))


def _cut(
    prompt: list[int], sides: list[list[int]], tokenizer: Tokenizer, max_length: int
) -> tuple[list[int], list[list[int]]]:
    room = max_length - max(len(side) for side in sides)
    # Never above the prompt's own length; and a long completion may not push the prompt out altogether.
    keep = min(len(prompt), max(room, max_length // 4))
    return _last_tokens(prompt, keep, tokenizer.bos_id), [side[: max_length - keep] for side in sides]


def encode_completions(
    prompt: str | tuple[Message, ...], completions: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> tuple[list[int], list[list[int]]]:
    """One prompt and all of its completions, shortened as in `encode_row`."""
    check_max_length(max_length)
    sides = [tokenizer.completion_ids(prompt, text) for text in completions]
    return _cut(tokenizer.prompt_ids(prompt), sides, tokenizer, max_length)


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
) -> EncodedRows:
    """The pairs of all rows, without those that teach nothing, and counts of what happened to them.

    on_error: 'raise' raises the tokenizer's first error as a RowError that starts with the row's place;
    'skip' collects them in `errors`.
    """
    check_on_error(on_error)
    check_max_length(max_length)
    pairs: list[TokenPair] = []
    errors: list[RowError] = []
    identical = empty = shortened = completions_cut = 0
    for row in rows:
        try:
            pair, was_shortened, cut = _encode(row, tokenizer, max_length)
        except ValueError as error:
            placed = RowError(f"{row.where}: {error}" if row.where else str(error))
            if on_error == "raise":
                raise placed from error
            errors.append(placed)
            continue
        if pair.chosen == pair.rejected:
            identical += 1
        elif not _scored(pair):
            empty += 1
        else:
            pairs.append(pair)
            shortened += was_shortened
            completions_cut += cut
    return EncodedRows(pairs, identical, empty, shortened, completions_cut, errors)


def _scored(pair: TokenPair) -> bool:
    """Whether both sides have a scored token; the first token of a sequence never is one."""
    return min(len(pair.chosen), len(pair.rejected)) > (0 if pair.prompt else 1)
