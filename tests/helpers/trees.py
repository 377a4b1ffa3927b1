import torch
from hypothesis import strategies as st
from torch import Generator

from dpo_wrapper.prefix_tree import PrefixTree

ids = st.integers(0, 2) | st.sampled_from([-(2**63), -256, -1, 255, 256, 2**63 - 1])


sequence_sets = st.lists(st.lists(ids, max_size=8), max_size=12)


@st.composite
def branching(draw):
    """Sequences that go on from prefixes of one another, or stop there."""
    rows = [draw(st.lists(ids, max_size=12))]
    for _ in range(draw(st.integers(0, 10))):
        like = draw(st.sampled_from(rows))
        kept = draw(st.integers(0, len(like)))
        rows.append(like[:kept] + draw(st.lists(ids, max_size=4)))
    return draw(st.permutations(rows))


def random_tree(seed: int, sequences: int = 6, longest: int = 200) -> PrefixTree:
    """Sequences that share beginnings of one stem, over a few ids, so that some share more by chance."""
    generator = Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(0, high, (), generator=generator))

    stem = torch.randint(0, 3, (longest,), generator=generator)
    tails = [torch.randint(0, 3, (1 + number(longest),), generator=generator) for _ in range(sequences)]
    return PrefixTree.from_sequences([torch.cat([stem[: number(longest)], tail]) for tail in tails])
