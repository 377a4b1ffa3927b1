import torch

from dpo_wrapper import PreferenceDataset
from dpo_wrapper.data import TokenizedExample


def pairs(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(least):
        n = int(torch.randint(least, 5, (), generator=generator))
        return tuple(torch.randint(37, (n,), generator=generator).tolist())

    return [TokenizedExample(ids(1), (ids(1), ids(1))) for _ in range(count)]


def dataset(rows=None):
    return PreferenceDataset(pairs() if rows is None else rows, -100)
