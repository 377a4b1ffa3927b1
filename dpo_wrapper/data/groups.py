"""Entries in groups that fit one forward pass."""

from collections.abc import Sequence

from .encode import Entry


def micro_batches(entries: Sequence[Entry], most: int) -> list[list[int]]:
    """Indices of entries in groups of at most `most` unique tokens each, or of one entry.

    Those with long common prefixes come together: in the order of their prompts.
    """
    groups: list[list[int]] = []
    room = 0
    before: tuple[int, ...] = ()
    for k in sorted(range(len(entries)), key=lambda k: (entries[k].prompt, k)):
        prompt = tuple(entries[k].prompt)
        tokens = len(prompt) + sum(map(len, entries[k].completions))
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
