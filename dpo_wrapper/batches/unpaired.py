"""Prompts with completions of other prompts."""

import random
from collections.abc import Hashable, Sequence


def kl_partner_indices(prompts: Sequence[Hashable], seed: int = 0) -> list[int | None]:
    """For each row another whose completion it takes as one that has nothing to do with its prompt.

    Rows of one prompt never take from one another. Each row gives its completion to one other; only if a
    prompt has more than half of all rows do some of them find none left and get None.

        prompts   a  a  b  c        rows in the order of their prompts, these shuffled by the seed, and
        partner   2  3  0  1        turned by as many places as the most frequent prompt has rows
    """
    by_prompt: dict[Hashable, list[int]] = {}
    for k, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(k)
    groups = list(by_prompt.values())
    random.Random(seed).shuffle(groups)
    rows = [k for group in groups for k in group]
    turn = max(map(len, groups), default=0)
    found: list[int | None] = [None] * len(rows)
    for k, row in enumerate(rows):
        other = rows[(k + turn) % len(rows)]
        found[row] = other if prompts[other] != prompts[row] else None
    return found
