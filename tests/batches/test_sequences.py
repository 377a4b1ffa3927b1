"""Sequences against naive loops over Python lists, under any masks and padding; batches and metrics."""

import math
import random
from dataclasses import fields
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_wrapper import PairLogProbs, PreferenceBatch, Sigmoid
from dpo_wrapper.batches import ScoredSequences, SequenceLogProbs
from dpo_wrapper.metrics import COUNTS, MetricSums, batch_metrics

SLOW = settings(max_examples=150, derandomize=True)
RANDOMS = st.builds(random.Random, st.integers(0, 2**32 - 1))  # `st.randoms` draws each number by itself
WILD = (-(2**62), -100, -1, 0, 1, 2**31, 2**62)  # what may stand in padding


class Token(NamedTuple):
    id: int
    real: bool
    scored: bool


@st.composite
def grids(draw, least: int = 0, most: int = 5) -> list[list[Token]]:
    """Rows of one width, with any masks; a scored mark on padding means nothing."""
    rows, width = draw(st.integers(least, most)), draw(st.integers(0, 7))
    chance = draw(st.sampled_from([(0.5, 0.5), (0.9, 0.5), (0.5, 0.1), (1.0, 0.9), (0.0, 1.0), (0.9, 0.0)]))
    randomness = draw(RANDOMS)

    def token() -> Token:
        real = randomness.random() < chance[0]
        # few different ids, so that sequences share prefixes
        id_ = randomness.randint(0, 2) if real else randomness.choice(WILD)
        return Token(id_, real, randomness.random() < chance[1])

    return [[token() for _ in range(width)] for _ in range(rows)]


def tensors(grid: list[list[Token]]) -> tuple[Tensor, Tensor, Tensor]:
    width = len(grid[0]) if grid else 3

    def table(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[getattr(x, name) for x in row] for row in grid], dtype=dtype).view(
            len(grid), width
        )

    return table("id", torch.long), table("scored", torch.bool), table("real", torch.bool)


def naive(grid: list[list[Token]]) -> list[list[tuple[list[int], int]]]:
    """For each row its scored tokens: the real ids before one, and its own."""
    rows = []
    for row in grid:
        real = [x for x in row if x.real]
        rows.append([([x.id for x in real[:k]], real[k].id) for k in range(1, len(real)) if real[k].scored])
    return rows


def made(grid: list[list[Token]]) -> ScoredSequences:
    return ScoredSequences.from_padded(*tensors(grid))


def row_of(ids: list[int], real: str | None = None, scored: str | None = None) -> list[Token]:
    real, scored = real or "x" * len(ids), scored or "x" * len(ids)
    return [Token(*t) for t in zip(ids, [c == "x" for c in real], [c == "x" for c in scored], strict=True)]


# ScoredSequences


def test_the_drawing():
    #     seq     .  a  b  .  c  d         ids       a  b  c
    #     real    0  1  1  0  1  1         row       0  0
    #     scored  0  0  0  0  1  1         source    1  2
    #                                      target    c  d
    a, b, c, d = 5, 6, 7, 8
    got = made([row_of([99, a, b, 99, c, d], ".xx.xx", "....xx")])
    assert got.ids.tolist() == [[a, b, c]]
    assert (got.row.tolist(), got.source.tolist(), got.target.tolist()) == ([0, 0], [1, 2], [c, d])
    assert (got.length.tolist(), got.real.tolist()) == ([2], [3])


@given(grids())
@SLOW
@example([])
@example([[], []])
@example([row_of([-100], ".")])
@example([row_of([4])])
@example([row_of([4, 5, 6], "xxx", "x..")])  # only the first token is marked, and it is never scored
def test_from_padded_is_the_naive_loop(grid: list[list[Token]]):
    before = [x.clone() for x in tensors(grid)]
    given = tensors(grid)
    got, expected = ScoredSequences.from_padded(*given), naive(grid)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))

    assert got.length.tolist() == [len(scores) for scores in expected]
    flat = [(k, *score) for k, scores in enumerate(expected) for score in scores]
    assert got.row.tolist() == [k for k, _, _ in flat]  # row by row, and from left to right
    assert got.target.tolist() == [target for _, _, target in flat]
    for (k, before_it, _), source in zip(flat, got.source.tolist(), strict=True):
        assert got.ids[k, : source + 1].tolist() == before_it  # all that its score may depend on

    # every row is a prefix of its real tokens, and the rest of it a valid id
    width = got.ids.shape[1]
    reals = [[x.id for x in row if x.real] for row in grid]
    assert width >= 1 and got.ids.shape[0] == len(grid)
    # of which what stands behind a row's last scored token is left out, and that token too
    assert got.real.tolist() == [
        max([0, *(len(before_it) for before_it, _ in scores)]) for scores in expected
    ]
    for ids, n, real in zip(got.ids.tolist(), got.real.tolist(), reals, strict=True):
        assert ids[:n] == real[:n]
        assert set(ids[n:]) <= {real[0] if real else 0}
    # no wider than the longest input of a score, but never empty
    assert width == max([1, *(len(before_it) for _, before_it, _ in flat)])
    assert all(getattr(got, field.name).dtype == torch.long for field in fields(got))


@pytest.mark.pitfall(16, 20)
@given(grids(), RANDOMS, st.integers(0, 3))
@SLOW
def test_padding_changes_nothing(grid: list[list[Token]], randomness: random.Random, more: int):
    # padding of any content, anywhere, on any rows
    width = (len(grid[0]) if grid else 0) + more
    other = []
    for row in grid:
        real = [x for x in row if x.real]
        places = sorted(randomness.sample(range(width), len(real)))
        moved = [Token(randomness.choice(WILD), False, randomness.random() < 0.5) for _ in range(width)]
        for place, token in zip(places, real, strict=True):
            moved[place] = token
        other.append(moved)
    one, two = made(grid), made(other)
    for field in fields(one):
        assert torch.equal(getattr(one, field.name), getattr(two, field.name)), field.name


@given(grids())
@SLOW
def test_rows_do_not_touch_each_other(grid: list[list[Token]]):
    # in another order, the same tokens are scored in the same contexts
    def scores(got: ScoredSequences, k: int) -> list[tuple[list[int], int]]:
        at = [i for i, row in enumerate(got.row.tolist()) if row == k]
        return [(got.ids[k, : got.source[i] + 1].tolist(), got.target[i].item()) for i in at]

    whole, turned = made(grid), made(grid[::-1])
    for k in range(len(grid)):
        alone = made([grid[k]])
        assert scores(whole, k) == scores(alone, 0) == scores(turned, len(grid) - 1 - k)


def test_int32_ids():
    seq, scored, real = tensors([row_of([1, 2, 3])])
    got = ScoredSequences.from_padded(seq.int(), scored, real)
    assert got.ids.dtype == got.target.dtype == torch.long and got.target.tolist() == [2, 3]


@given(grids())
@SLOW
def test_sums(grid: list[list[Token]]):
    got = made(grid)
    scores = torch.arange(1.0, len(got.row) + 1).double().requires_grad_()
    sums = got.sum_per_sequence(scores)
    expected = [0.0] * len(grid)
    for k, score in zip(got.row.tolist(), scores.tolist(), strict=True):
        expected[k] += score
    assert sums.tolist() == expected and sums.dtype == torch.float64

    weights = torch.arange(1.0, len(grid) + 1).double()
    (grad,) = torch.autograd.grad((sums * weights).sum(), scores)
    assert grad.tolist() == [k + 1.0 for k in got.row.tolist()]


# prefixes


def size_of_trie(sequences: list[list[int]]) -> int:
    trie: dict = {}
    size = 0
    for sequence in sequences:
        node = trie
        for token in sequence:
            size += token not in node
            node = node.setdefault(token, {})
    return size


def sequences_of(rows: list[list[int]]) -> ScoredSequences:
    """Just rows of ids; nothing is scored."""
    width, none = max([1, *map(len, rows)]), torch.zeros(0, dtype=torch.long)
    ids = torch.tensor([row + [7] * (width - len(row)) for row in rows]).long().view(len(rows), width)
    real = torch.tensor([len(row) for row in rows]).long()
    return ScoredSequences(ids, none, none, none, torch.zeros_like(real), real)


@st.composite
def prefix_sharing(draw) -> list[list[int]]:
    """Rows that continue others, repeat them, stop short of them, or are empty."""
    rows: list[list[int]] = [[]]
    for _ in range(draw(st.integers(0, 6))):
        stem = draw(st.sampled_from(rows))
        cut = draw(st.integers(0, len(stem)))
        rows.append(stem[:cut] + draw(st.lists(st.sampled_from([0, 1, 7, 10**9]), max_size=4)))
    return draw(st.permutations(rows if draw(st.booleans()) else rows[1:]))


@given(prefix_sharing())
@SLOW
@example([[1, 2, 3, 4], [1, 2, 8, 9], [5, 6]])  # the tree drawn in design.md: 8 unique tokens
@example([[7, 7], [7], []])  # where padding looks like tokens
@example([[2], [10], [1, 0]])  # sorted as numbers, not as text
def test_unique_tokens_is_the_size_of_the_trie(rows: list[list[int]]):
    assert sequences_of(rows).unique_tokens() == size_of_trie(rows)


def test_unique_tokens_by_hand():
    assert sequences_of([[1, 2, 3, 4], [1, 2, 8, 9], [5, 6]]).unique_tokens() == 8
    assert sequences_of([]).unique_tokens() == 0
    assert sequences_of([[], []]).unique_tokens() == 0


@given(grids())
@SLOW
def test_unique_tokens_counts_inputs(grid: list[list[Token]]):
    got = made(grid)
    rows = [max((before_it for before_it, _ in scores), key=len, default=[]) for scores in naive(grid)]
    assert got.unique_tokens() == size_of_trie(rows) <= got.ids.numel()


# PreferenceBatch


@st.composite
def batches(draw, least: int = 0) -> tuple[PreferenceBatch, list[list[Token]], list[list[Token]]]:
    b = draw(st.integers(least, 4))
    sides = draw(grids(b, b)), draw(grids(b, b))
    chosen, rejected = map(tensors, sides)
    batch = PreferenceBatch.from_padded(
        (chosen[0], rejected[0]), (~chosen[1], ~rejected[1]), (chosen[2], rejected[2])
    )
    return batch, *sides


@given(batches())
@SLOW
def test_batch_of_two_sides(given):
    batch, chosen, rejected = given
    b = len(chosen)
    assert batch.pair_index.tolist() == [[k, b + k] for k in range(b)]
    counts = [len(scores) for side in (chosen, rejected) for scores in naive(side)]
    assert batch.sequences.length.tolist() == counts
    # sides of unequal width are one stack, as if they had been of one width all along
    width = max(len(row) for side in (chosen, rejected) for row in [*side, []])
    stack = [
        row + [Token(-1, False, True)] * (width - len(row)) for side in (chosen, rejected) for row in side
    ]
    for field in fields(ScoredSequences):
        assert torch.equal(getattr(batch.sequences, field.name), getattr(made(stack), field.name))

    valid = [counts[k] > 0 and counts[b + k] > 0 for k in range(b)]
    assert batch.valid.tolist() == valid and batch.valid.dtype == torch.bool
    tokens = sum(n for n, ok in zip(counts[:b], valid, strict=True) if ok)
    assert batch.step_totals() == (sum(valid), tokens)


def one_batch() -> PreferenceBatch:
    chosen = tensors(
        [row_of([1, 2, 3], scored=".xx"), row_of([1, 2, 3], scored="..."), row_of([4, 5, 6], "xx.")]
    )
    rejected = tensors([row_of([1, 2], scored=".x"), row_of([1, 2], scored=".x"), row_of([4, 5])])
    seqs, prompts, reals = zip(chosen, rejected, strict=True)
    return PreferenceBatch.from_padded(seqs, tuple(~p for p in prompts), reals)


def test_counts_by_hand():
    # pair 0 scores 2 and 1, pair 1 nothing and 1, pair 2 scores 1 (its third is padding) and 1
    assert one_batch().valid.tolist() == [True, False, True]
    assert one_batch().step_totals() == (2, 3)


def test_pairs_may_share_sequences():
    # K completions of one prompt: each sequence once, pairs are an index into them
    sequences = made([row_of([1, 2]), row_of([1, 3]), row_of([1, 0], "x.")])
    batch = PreferenceBatch(sequences, torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]]))
    assert batch.valid.tolist() == [True, True, False, True] and batch.step_totals() == (3, 3)
    assert PreferenceBatch(sequences, torch.zeros(0, 2, dtype=torch.long)).step_totals() == (0, 0)


def test_as_part_of():
    batch = one_batch()
    part = batch.with_step_totals(10, 70)
    assert (part.step_denominator, part.step_chosen_tokens) == (10, 70)
    assert part.sequences is batch.sequences and part.pair_index is batch.pair_index
    assert (batch.step_denominator, batch.step_chosen_tokens) == (None, None)
    assert part.with_step_totals(3, 4).step_denominator == 3


def test_to_moves_everything():
    batch = one_batch().with_step_totals(10, 70)
    moved = batch.to("meta")
    assert type(moved) is PreferenceBatch and type(moved.sequences) is ScoredSequences
    assert moved.pair_index.device.type == "meta" and (moved.step_denominator, moved.step_chosen_tokens) == (
        10,
        70,
    )
    for field in fields(ScoredSequences):
        there, here = getattr(moved.sequences, field.name), getattr(batch.sequences, field.name)
        assert there.device.type == "meta" and there.shape == here.shape and there.dtype == here.dtype
    assert batch.pair_index.device.type == "cpu"
    assert torch.equal(batch.to(torch.device("cpu")).sequences.ids, batch.sequences.ids)


def test_batches_are_frozen():
    with pytest.raises(AttributeError):
        one_batch().step_denominator = 3
    with pytest.raises(AttributeError):
        one_batch().sequences.ids = torch.zeros(1)


# metrics


def log_probs_of(batch: PreferenceBatch, policy: Tensor, reference: Tensor | None) -> PairLogProbs:
    return batch.log_probs(
        SequenceLogProbs(policy), None if reference is None else SequenceLogProbs(reference)
    )


def scored_by_hand(batch: PreferenceBatch, seed: int = 0, *, reference: bool = True) -> dict[str, Tensor]:
    """Metrics of a batch whose log-probs are random."""
    generator = torch.Generator().manual_seed(seed)
    s = len(batch.sequences.ids)
    policy = -10 * torch.rand(s, generator=generator, dtype=torch.float64)
    ref = -10 * torch.rand(s, generator=generator, dtype=torch.float64)
    pairs = log_probs_of(batch, policy, ref if reference else None)
    return batch_metrics(batch, pairs, Sigmoid(0.5)(pairs), Sigmoid(0.5))


def test_metrics_by_hand():
    # pair 0: p (-2, -6), r (-3, -4), a 1, b -2; pair 1 has nothing to score; pair 2: p = r = (-5, -5)
    batch = one_batch()
    policy = torch.tensor([-2.0, -99.0, -5.0, -6.0, -99.0, -5.0]).double()
    reference = torch.tensor([-3.0, -99.0, -5.0, -4.0, -99.0, -5.0]).double()
    pairs = log_probs_of(batch, policy.requires_grad_(), reference)
    metrics = batch_metrics(batch, pairs, Sigmoid(0.5)(pairs), Sigmoid(0.5))
    expected = {
        "loss": (math.log1p(math.exp(-1.5)) + math.log(2)) / 2,
        "rewards/chosen": 0.5 * (1 + 0) / 2,
        "rewards/rejected": 0.5 * (-2 + 0) / 2,
        "rewards/margins": 0.5 * (3 + 0) / 2,
        "rewards/accuracies": (1 + 0.5) / 2,  # a tie counts half
        "logps/chosen": -3.5,
        "logps/rejected": -5.5,
        "logps/ref_chosen": -4.0,
        "logps/ref_rejected": -4.5,
        "kl/chosen": 0.5,
        "length/chosen": 1.5,
        "length/rejected": 1.0,
        "pairs/valid": 2.0,
        # inputs 1 2, none, 4, 1, 1, 4: up to the last token that is scored, without it
        "tokens/unique": 3.0,
        "tokens/padded": 12.0,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-12)
    assert not any(value.requires_grad or value.ndim for value in metrics.values())

    bare = batch_metrics(batch, log_probs_of(batch, policy, None), torch.zeros(2).double(), Sigmoid(0.5))
    assert expected.keys() - bare.keys() == {"logps/ref_chosen", "logps/ref_rejected", "kl/chosen"}
    assert bare["rewards/chosen"].item() == pytest.approx(0.5 * -3.5)  # p_w itself


def added(*parts: dict[str, Tensor]) -> dict[str, float]:
    sums = MetricSums()
    for part in parts:
        sums.add(part)
    return sums.result()


def test_sums_by_hand():
    # 3 pairs with loss 1 and 1 pair with loss 5: the mean is 2, the mean of means would be 3
    def part(loss: float, pairs: float, tokens: float) -> dict[str, Tensor]:
        return {
            "loss": torch.tensor(loss),
            "pairs/valid": torch.tensor(pairs),
            "tokens/unique": torch.tensor(tokens),
        }

    one, two, none = part(1.0, 3.0, 10.0), part(5.0, 1.0, 20.0), part(0.0, 0.0, 7.0)
    assert added(one, two, none) == {"loss": 2.0, "pairs/valid": 4.0, "tokens/unique": 37.0}
    assert added(none) == {"loss": 0.0, "pairs/valid": 0.0, "tokens/unique": 7.0}
    assert added() == {}
    assert all(torch.equal(one[name], part(1.0, 3.0, 10.0)[name]) for name in one)  # none was changed


@pytest.mark.slow
@pytest.mark.pitfall(23)
@given(batches(least=1), st.integers(0, 9), st.integers(1, 3), st.booleans(), RANDOMS)
@SLOW
def test_sums_equal_one_big_batch(given, seed: int, size: int, reference: bool, randomness: random.Random):
    batch, chosen, rejected = given
    b = len(chosen)
    generator = torch.Generator().manual_seed(seed)
    policy, ref = (-10 * torch.rand(2 * b, generator=generator, dtype=torch.float64) for _ in range(2))

    def metrics(rows: list[int]) -> dict[str, Tensor]:
        parts = [tensors([side[k] for k in rows]) for side in (chosen, rejected)]
        seqs, scored, reals = zip(*parts, strict=True)
        part = PreferenceBatch.from_padded(seqs, tuple(~x for x in scored), reals)
        at = [*rows, *(b + k for k in rows)]
        pairs = log_probs_of(part, policy[at], ref[at] if reference else None)
        return batch_metrics(part, pairs, Sigmoid(0.5)(pairs), Sigmoid(0.5))

    whole = added(metrics(list(range(b))))
    order = randomness.sample(range(b), b)
    parts = [metrics(order[start : start + size]) for start in range(0, b, size)]
    # shared prefixes and padding depend on which rows are together; everything else does not
    together = ("tokens/unique", "tokens/padded")
    got = {name: value for name, value in added(*parts).items() if name not in together}
    assert got == pytest.approx({k: v for k, v in whole.items() if k not in together}, rel=1e-12, abs=1e-12)
    assert whole["pairs/valid"] == batch.step_totals()[0]
    assert added(*parts)["tokens/unique"] >= 0
    assert added(*parts) == pytest.approx(added(*parts[::-1]), rel=1e-12, abs=1e-12)


@pytest.mark.pitfall(22)
def test_sums_over_processes():
    # each of three processes has one part, and sees the sum of all
    parts = [scored_by_hand(one_batch(), seed) for seed in range(3)]
    processes = [MetricSums() for _ in parts]
    for process, part in zip(processes, parts, strict=True):
        process.add(part)
    tables: list[Tensor] = []

    def collect(table: Tensor) -> Tensor:
        tables.append(table)
        return table

    for process in processes:
        process.result(collect)
    for process in processes:
        result = process.result(lambda table: torch.stack(tables).sum(dim=0))
        assert result == pytest.approx(added(*parts), rel=1e-12)


def test_sums_do_not_lose_small_batches():
    # 2^24 + 1 is no float32
    part = {
        "loss": torch.tensor(1.0),
        "pairs/valid": torch.tensor(1.0),
        "tokens/padded": torch.tensor(2.0**24),
    }
    assert added(part, part | {"tokens/padded": torch.tensor(1.0)})["tokens/padded"] == 2**24 + 1


def test_sums_keep_no_graph():
    sums = MetricSums()
    sums.add({"loss": torch.ones((), requires_grad=True) * 2, "pairs/valid": torch.ones(())})
    assert all(isinstance(value, float) for value in sums.sums.values())


def test_a_count_is_no_mean():
    metrics = scored_by_hand(one_batch())
    assert {"pairs/valid", "tokens/unique", "tokens/padded"} == set(COUNTS) & set(metrics)
    assert added(metrics) == pytest.approx({name: value.item() for name, value in metrics.items()})
