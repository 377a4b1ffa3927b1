import torch
from torch import Generator, Tensor

from dpo_wrapper import RankedBatch, UnpairedBatch
from dpo_wrapper.losses import KTO, PlackettLuce, RankedLogProbs, UnpairedLogProbs
from helpers.models import VOCAB


def doubles(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_lists(policy: list, reference: list | None = None, is_real: list | None = None) -> RankedLogProbs:
    """Log-probs of lists; those of the policy require gradients."""
    leaf = doubles(policy).requires_grad_()
    mask = torch.ones_like(leaf, dtype=torch.bool) if is_real is None else torch.tensor(is_real)
    return RankedLogProbs(leaf, None if reference is None else doubles(reference), mask)


def make_rows(policy: list, reference: list | None, label: list[bool], kl: float) -> UnpairedLogProbs:
    """Log-probs of completions with a label; those of the policy and the KL require gradients."""
    leaves = doubles(policy).requires_grad_(), doubles(kl).requires_grad_()
    fixed = None if reference is None else doubles(reference)
    return UnpairedLogProbs(leaves[0], fixed, torch.tensor(label), leaves[1])


def ids(generator: Generator, n: int) -> list[int]:
    return torch.randint(VOCAB, (n,), generator=generator).tolist()


def lists_of_ids() -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = Generator().manual_seed(0)
    prompts = [ids(generator, n) for n in (3, 5, 2)]
    return prompts, [[ids(generator, n) for n in ns] for ns in ((4, 2, 6), (1, 3), (5, 5, 2, 3))]


def rows_of_ids() -> tuple[list[list[int]], list[list[int]], list[bool]]:
    generator = Generator().manual_seed(1)
    prompts = [ids(generator, n) for n in (3, 5, 2, 4, 1)]
    return prompts, [ids(generator, n) for n in (4, 2, 6, 1, 3)], [True, False, True, True, False]


def lists_in_parts() -> tuple:
    prompts, completions = lists_of_ids()
    weights = doubles([1.0, 0.5, 2.0])
    parts = [
        RankedBatch.from_lists(prompts[k : k + 1], completions[k : k + 1], weights[k : k + 1])
        for k in range(3)
    ]
    return PlackettLuce(0.2), RankedBatch.from_lists(prompts, completions, weights), parts


def rows_in_parts() -> tuple:
    prompts, completions, labels = rows_of_ids()
    others = [completions[k - 2] for k in range(5)]
    others[3] = []  # no estimate from this one
    weights = doubles([1.0, 0.5, 2.0, 0.0, 3.0])

    def part(rows: slice) -> UnpairedBatch:
        return UnpairedBatch.from_lists(
            prompts[rows], completions[rows], labels[rows], others[rows], weights[rows]
        )

    return KTO(0.5, 1.5, 0.5), part(slice(None)), [part(slice(0, 1)), part(slice(1, 4)), part(slice(4, 5))]
