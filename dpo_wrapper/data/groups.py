"""Pairs in groups that fit one forward pass."""

from collections.abc import Sequence

from .encode import TokenPair


def micro_batches(pairs: Sequence[TokenPair], most: int) -> list[list[int]]:
    """Indices of pairs in groups of at most `most` unique tokens each, or of one pair.

    Pairs with long common prefixes come together: in the order of their prompts.
    """
    groups: list[list[int]] = []
    room = 0
    before: tuple[int, ...] = ()
    for k in sorted(range(len(pairs)), key=lambda k: (pairs[k].prompt, k)):
        prompt = tuple(pairs[k].prompt)
        tokens = len(prompt) + len(pairs[k].chosen) + len(pairs[k].rejected)
        shared = next((n for n, (a, b) in enumerate(zip(prompt, before, strict=False)) if a != b), None)
        shared = min(len(prompt), len(before)) if shared is None else shared
        if groups and tokens - shared <= room:
            groups[-1].append(k)
            room -= tokens - shared
        else:
            groups.append([k])
            room = most - tokens
        before = prompt
    return groups
