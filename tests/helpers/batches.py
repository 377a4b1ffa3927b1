"""Random preference batches with awkward rows, and the same batch with its padding elsewhere."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

PATTERNS = ("prefix", "turns", "single", "none", "all")
PADDINGS = ("left", "right", "middle", "mixed")


@dataclass(frozen=True)
class Case:
    """Arguments of a DPO call. Ids and prompt masks in padded places are random: they should not matter."""

    preferred_seq: Int[Tensor, "b n"]
    unpreferred_seq: Int[Tensor, "b m"]
    prompt_masks: tuple[Bool[Tensor, "b n"], Bool[Tensor, "b m"]]
    seq_masks: tuple[Bool[Tensor, "b n"], Bool[Tensor, "b m"]]


# one row of one side, before padding: its real tokens and which of them are prompt

Row = tuple[Int[Tensor, "n"], Bool[Tensor, "n"]]


def draw(generator: Generator, low: int, high: int) -> int:
    """Uniform over `low .. high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def chance(generator: Generator, p: float) -> bool:
    return bool(torch.rand((), generator=generator) < p)


def coins(generator: Generator, n: int) -> Bool[Tensor, "n"]:
    return torch.rand(n, generator=generator) < 0.5


def random_prompt(generator: Generator, n: int, pattern: str) -> Bool[Tensor, "n"]:
    """Draw a prompt mask, True on prompt; the pattern `any` is one of the others."""
    if pattern == "any":
        # 'all' leaves nothing to score: rare, or most pairs would be invalid
        pattern = PATTERNS[draw(generator, 0, len(PATTERNS) - (1 if chance(generator, 0.2) else 2))]

    prompt = torch.zeros(n, dtype=torch.bool)
    if pattern == "prefix":
        prompt[: draw(generator, min(1, n), max(n - 1, min(1, n)))] = True
    elif pattern == "turns":  # prompt, answer, prompt, answer, ...
        start, is_prompt = 0, chance(generator, 0.8)
        while start < n:
            end = start + draw(generator, 1, 3)
            prompt[start:end] = is_prompt
            start, is_prompt = end, not is_prompt
    elif pattern == "single":  # tokens here and there
        prompt = coins(generator, n)
    elif pattern == "all":
        prompt[:] = True
    elif pattern != "none":
        raise ValueError(f"pattern is one of {('any', *PATTERNS)}, not {pattern!r}")
    return prompt


def places_of(generator: Generator, n: int, width: int, padding: str) -> list[int]:
    """Draw which `n` of `width` places hold the real tokens, in order; the rest is padding."""
    if padding == "mixed":
        padding = ("left", "right", "middle", "scattered")[draw(generator, 0, 3)]

    spare = width - n
    if padding == "left":
        return list(range(spare, width))
    if padding == "right":
        return list(range(n))
    if padding == "middle":  # one run of padding with real tokens on both sides, where there are two of them
        before = draw(generator, 1, n - 1) if n > 1 else 0
        return [*range(before), *range(before + spare, width)]
    if padding == "scattered":
        return sorted(torch.randperm(width, generator=generator)[:n].tolist())
    raise ValueError(f"padding is one of {PADDINGS}, not {padding!r}")


def lay_out(
    generator: Generator, rows: list[Row], width: int, padding: str, vocab: int
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Pad the rows of one side: sequences, prompt masks and sequence masks."""
    seqs = torch.randint(0, vocab, (len(rows), width), generator=generator)
    prompt_masks = coins(generator, len(rows) * width).view(len(rows), width)
    seq_masks = torch.zeros(len(rows), width, dtype=torch.bool)

    for i, (ids, prompt) in enumerate(rows):
        places = places_of(generator, len(ids), width, padding)
        seqs[i, places], prompt_masks[i, places], seq_masks[i, places] = ids, prompt, True

    return seqs, prompt_masks, seq_masks


def random_batch(
    generator: Generator,
    vocab: int = 37,
    b: int = 3,
    longest: int = 9,
    pattern: str = "any",
    *,
    padding: str = "any",
    odd: float = 0.25,
) -> Case:
    """A batch of `b` pairs with rows of up to `longest` real tokens.

    - `pattern` of the prompt masks, drawn for each row of each side: `any` or one of `PATTERNS`.
    - `padding` of both sides: `any` or one of `PADDINGS`; `mixed` differs from row to row, and may be
      scattered.
    - `odd`: how often a row has one token, nothing scored, or no token at all. With 0, every row has at least
      two tokens and every pair is valid, unless the pattern is `all`.

    Most pairs share a prefix, as pairs with one prompt do, some rows share one with other rows, and now and
    then the two sides are equal. Widths go up to `longest + 3`, so that columns of nothing but padding occur,
    and mostly differ between the sides.
    """
    assert longest >= 2 and vocab >= 2
    stem = torch.randint(0, vocab, (longest,), generator=generator)  # what several rows may begin with

    def random_row(like: Row | None) -> Row:
        kind = draw(generator, 0, 2) if chance(generator, odd) else None
        n = 0 if kind == 0 else 1 if kind == 1 else draw(generator, 2, longest)
        ids = torch.randint(0, vocab, (n,), generator=generator)

        source = like[0] if like is not None else stem
        if n and len(source) and chance(generator, 0.6):
            shared = draw(generator, 1, min(n, len(source)))
            ids[:shared] = source[:shared]

        prompt = random_prompt(generator, n, "all" if kind == 2 else pattern)
        if not odd and pattern != "all" and prompt[1:].all():  # something to score
            prompt[draw(generator, 1, n - 1)] = False
        return ids, prompt

    preferred, unpreferred = [], []
    for _ in range(b):
        preferred.append(random_row(None))
        twin = chance(generator, 0.1)
        unpreferred.append(preferred[-1] if twin else random_row(preferred[-1]))

    widths = [
        max(1, max(len(ids) for ids, _ in rows)) + draw(generator, 0, 2) for rows in (preferred, unpreferred)
    ]
    if widths[0] == widths[1] and chance(generator, 0.8):
        widths[draw(generator, 0, 1)] += 1

    if padding == "any":
        padding = PADDINGS[draw(generator, 0, len(PADDINGS) - 1)]

    laid_out = [
        lay_out(generator, rows, width, padding, vocab)
        for rows, width in zip((preferred, unpreferred), widths, strict=True)
    ]
    seqs, prompt_masks, seq_masks = zip(*laid_out, strict=True)
    preferred_seq, unpreferred_seq = seqs
    return Case(preferred_seq, unpreferred_seq, prompt_masks, seq_masks)


def repad(case: Case, side: str) -> Case:
    """The same real tokens, with padding `left`, `right` or in the `middle` of every row.

    Each side is two places wider than its longest row, and what stands in padded places changes. The same
    case and side give the same result each time.
    """
    if side not in ("left", "right", "middle"):
        raise ValueError(f"side is 'left', 'right' or 'middle', not {side!r}")

    generator = Generator().manual_seed(1)
    vocab = int(max(case.preferred_seq.max(), case.unpreferred_seq.max())) + 1

    laid_out = []
    seqs = (case.preferred_seq, case.unpreferred_seq)
    for seq, prompt_mask, seq_mask in zip(seqs, case.prompt_masks, case.seq_masks, strict=True):
        rows = [
            (ids[real], prompt[real]) for ids, prompt, real in zip(seq, prompt_mask, seq_mask, strict=True)
        ]
        width = max(len(ids) for ids, _ in rows) + 2
        laid_out.append(lay_out(generator, rows, width, side, vocab))

    (preferred_seq, unpreferred_seq), prompt_masks, seq_masks = zip(*laid_out, strict=True)
    return Case(preferred_seq, unpreferred_seq, prompt_masks, seq_masks)
