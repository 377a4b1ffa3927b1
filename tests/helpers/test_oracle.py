"""The oracle against numbers known in closed form, and the zoo and the cases against what they promise."""

import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from math import exp, inf, log, nan
from pathlib import Path

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helpers import oracle as oracle
from helpers.batches import PADDINGS, PATTERNS, Case, random_batch, repad
from helpers.models import CONTEXT, VOCAB, ZOO, PlainGRU, randomise_, seeded
from helpers.oracle import (
    ExactFloat64,
    dpo_oracle,
    ipo_loss,
    log_sigmoid,
    logits_of,
    sequence_score,
    sft_oracle,
    sigmoid_loss,
    sigmoid_norm_loss,
    simpo_loss,
    to_float64,
    token_scores,
)

A, B, C = 0, 1, 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads: up to ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Bigram(nn.Module):
    """p(next | last) from a table of probabilities."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(table, dtype=torch.float64).log() + 5.0)  # not normalised

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        return self.logits[ids]


class Urn(nn.Module):
    """Polya's urn: p(next = k | prefix) = (w_k + times k came before) / (sum of w + length)."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        seen = nn.functional.one_hot(ids, len(self.weights)).cumsum(dim=1)
        return (self.weights + seen).log()


def ids_of(*ids: int) -> Int[Tensor, "n"]:
    return torch.tensor(ids, dtype=torch.long)


def bools(marks: str) -> Tensor:
    """`'x.x'` is True, False, True."""
    return torch.tensor([mark == "x" for mark in marks], dtype=torch.bool)


def close(value: Tensor, expected: float) -> bool:
    return value.dtype == torch.float64 and value.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


# scores


def bigram() -> nn.Module:
    return Bigram([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4], [1 / 10, 6 / 10, 3 / 10]]).eval()


def test_bigram_closed_form():
    # a b c a: p(b | a) = 1/4, p(c | b) = 3/4, p(a | c) = 1/10
    scores = token_scores(bigram(), ids_of(A, B, C, A), bools("..xx"))
    assert len(scores) == 2 and close(scores[0], log(3 / 4)) and close(scores[1], log(1 / 10))

    total, count = sequence_score(bigram(), ids_of(A, B, C, A), bools("...."), bools("xxxx"))
    assert count == 3 and close(total, log(1 / 4 * 3 / 4 * 1 / 10))  # the first token is never scored


def test_urn_reads_the_whole_prefix():
    # one of each colour; b after a: 1/4, b after a b: 2/5, a after a b b: 2/6
    scores = token_scores(Urn([1, 1, 1]).eval(), ids_of(A, B, B, A), bools("xxxx"))
    assert [score.exp().item() for score in scores] == pytest.approx([1 / 4, 2 / 5, 2 / 6], rel=1e-12)


@pytest.mark.parametrize(
    "seq, real",
    [
        ([A, B, B, A, C, C, C], "xxxx..."),
        ([C, C, C, A, B, B, A], "...xxxx"),
        ([A, C, C, B, B, C, A], "x..xx.x"),
        ([B, A, B, C, B, A, B], ".xx.xx."),
    ],
)
def test_padding_is_dropped_wherever_it_stands(seq: list[int], real: str):
    seq_mask = bools(real)
    prompt_mask = torch.ones(7, dtype=torch.bool)  # padded places say prompt, then not prompt
    places = [i for i, mark in enumerate(real) if mark == "x"]
    prompt_mask[places] = bools("xx..")

    for flip in (False, True):
        prompt_mask[~seq_mask] ^= flip
        total, count = sequence_score(Urn([1, 1, 1]).eval(), ids_of(*seq), prompt_mask, seq_mask)
        assert count == 2 and close(total, log(2 / 5 * 2 / 6))


def test_prompt_of_several_turns():
    # a b b a, prompt a . b .: scored are the first b (1/4) and the last a (2/6)
    total, count = sequence_score(Urn([1, 1, 1]).eval(), ids_of(A, B, B, A), bools("x.x."), bools("xxxx"))
    assert count == 2 and close(total, log(1 / 4 * 2 / 6))


@pytest.mark.parametrize(
    "prompt, real", [("....", "...."), ("....", "..x."), ("xxxx", "xxxx"), (".xxx", "xxxx")]
)
def test_rows_with_nothing_to_score(prompt: str, real: str):
    total, count = sequence_score(bigram(), ids_of(A, B, C, A), bools(prompt), bools(real))
    assert count == 0 and total.item() == 0.0


def test_completions_sum_to_one():
    with seeded(0):
        model = to_float64(randomise_(PlainGRU(vocab=3), std=0.8))

    # p(y | x) over every y of two tokens; they must differ, or the sum says little
    scored = bools("...xx")
    sums = [
        sum(token_scores(model, ids_of(A, C, B, *completion), scored))
        for completion in product(range(3), repeat=2)
    ]
    probs = torch.stack(sums).exp()
    assert len(probs) == 9 and close(probs.sum(), 1.0)
    assert probs.std() > 0.01


def test_gradient_of_a_score_is_onehot_minus_probabilities():
    model = bigram()
    (score,) = token_scores(model, ids_of(A, B), bools(".x"))
    score.backward()

    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[A] = torch.tensor([-1 / 2, 1 - 1 / 4, -1 / 4])
    assert torch.allclose(model.logits.grad, expected, atol=1e-12)


def test_what_is_not_exact_is_refused():
    ids, scored = ids_of(A, B), bools(".x")
    with pytest.raises(AssertionError, match="eval mode"):
        token_scores(bigram().train(), ids, scored)
    with pytest.raises(AssertionError, match="float64"):
        token_scores(bigram().float(), ids, scored)


# losses, by hand: sums chosen so that every logarithm is known


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def pair_of(p_w: float, p_l: float, r_w: float, r_l: float) -> list[Tensor]:
    return [scalar(value) for value in (p_w, p_l, r_w, r_l)]


def test_log_sigmoid():
    assert close(log_sigmoid(scalar(log(3))), log(3 / 4))  # sigmoid(log 3) = 3 / (3 + 1)
    assert close(log_sigmoid(scalar(-log(3))), log(1 / 4))
    assert close(log_sigmoid(scalar(0.0)), -log(2))
    assert close(log_sigmoid(scalar(-1e4)), -1e4)
    assert close(log_sigmoid(scalar(40.0)), -exp(-40))
    assert log_sigmoid(scalar(1e4)).item() == 0.0

    for x in (-1e4, -1.0, 0.0, 1.0, 1e4):
        leaf = scalar(x).requires_grad_()
        log_sigmoid(leaf).backward()
        assert leaf.grad.item() == pytest.approx(1 / (1 + exp(x)) if x < 700 else 0.0)  # sigmoid(-x)


def test_sigmoid_by_hand():
    # delta = (-2 - -3) - (-5 - -4) = 2; beta = log(3) / 2 makes the argument log 3
    pair = pair_of(-2, -5, -3, -4)
    beta = log(3) / 2
    assert close(sigmoid_loss(beta)(*pair, 7, 9), log(4 / 3))
    assert close(sigmoid_loss(beta, label_smoothing=0.25)(*pair, 7, 9), 0.75 * log(4 / 3) + 0.25 * log(4))

    # of means: (1 / 2) - (-1 / 4) = 3 / 4
    assert close(sigmoid_norm_loss(log(3) * 4 / 3)(*pair, 2, 4), log(4 / 3))


def test_ipo_by_hand():
    # 1 / 2 + 1 / 4 - 1 / (2 * 0.1) = -4.25
    assert close(ipo_loss(0.1)(*pair_of(-2, -5, -3, -4), 2, 4), 4.25**2)


def test_simpo_by_hand():
    # means -1 and -2: 2 * (-1 - -2) - 0.5 = 1.5; the reference is not read
    assert close(
        simpo_loss(2.0, 0.5)(scalar(-3), scalar(-4), scalar(nan), scalar(inf), 3, 2), log(1 + exp(-1.5))
    )


@pytest.mark.parametrize("beta", [0.0, -1.0, nan, inf])
def test_beta_is_positive(beta: float):
    with pytest.raises(AssertionError):
        sigmoid_loss(beta)


# the batch


def urn_batch() -> Case:
    """Two pairs, the second of them without a scored unpreferred token."""
    return Case(
        preferred_seq=torch.tensor([[A, B, B, A], [A, B, C, C]]),
        unpreferred_seq=torch.tensor([[C, A, C], [A, C, C]]),
        prompt_masks=(torch.stack((bools("xx.."), bools("x..."))), torch.stack((bools("..."), bools("xxx")))),
        seq_masks=(torch.stack((bools("xxxx"), bools("xxxx"))), torch.stack((bools(".xx"), bools("xxx")))),
    )


def run(
    policy: nn.Module, reference: nn.Module | None, case: Case, loss: oracle.PairLoss
) -> dict[str, Tensor]:
    sides = (case.preferred_seq, case.unpreferred_seq)
    return dpo_oracle(policy, reference, *sides, case.prompt_masks, case.seq_masks, loss)


def test_batch_by_hand():
    result = run(Urn([1, 1, 1]).eval(), bigram(), urn_batch(), sigmoid_loss(1.0))

    # pair 0: a b [b a] and a [c]; pair 1: a [b c c] and nothing scored
    urn = dict(preferred=[2 / 5 * 2 / 6, 1 / 4 * 1 / 5 * 2 / 6], unpreferred=[1 / 4, 1])
    table = dict(preferred=[1 / 8 * 1 / 8, 1 / 4 * 3 / 4 * 3 / 10], unpreferred=[1 / 4, 1])
    for side in ("preferred", "unpreferred"):
        assert result[f"policy_{side}"].exp().tolist() == pytest.approx(urn[side], rel=1e-12)
        assert result[f"reference_{side}"].exp().tolist() == pytest.approx(table[side], rel=1e-12)

    assert result["count_preferred"].tolist() == [2, 3]
    assert result["count_unpreferred"].tolist() == [1, 0]
    assert result["valid"].tolist() == [True, False]

    # odds e^delta = (2/15 * 64) / (1/4 * 4) = 128 / 15, sigmoid = 128 / 143
    assert close(result["loss"], log(143 / 128))
    assert result["losses"].tolist() == pytest.approx([log(143 / 128), 0.0], rel=1e-12)
    assert close(sft_oracle(result), -log(2 / 15) / 2)


def test_invalid_pairs_change_nothing():
    case = urn_batch()
    first = Case(
        case.preferred_seq[:1],
        case.unpreferred_seq[:1],
        tuple(mask[:1] for mask in case.prompt_masks),
        tuple(mask[:1] for mask in case.seq_masks),
    )

    grads = []
    for batch in (case, first):
        policy = Urn([1, 2, 3]).eval()
        result = run(policy, bigram(), batch, sigmoid_loss(0.7))
        (result["loss"] + sft_oracle(result)).backward()
        grads.append((result["loss"].item(), sft_oracle(result).item(), policy.weights.grad.tolist()))

    assert grads[0] == grads[1]
    assert all(grads[0][2])


def test_no_valid_pair_is_a_differentiable_zero():
    case = urn_batch()
    policy = Urn([1, 2, 3]).eval()
    nothing = Case(
        case.preferred_seq,
        case.unpreferred_seq,
        tuple(torch.ones_like(m) for m in case.prompt_masks),
        case.seq_masks,
    )
    result = run(policy, None, nothing, ipo_loss(0.1))
    assert not result["valid"].any() and result["loss"].item() == 0.0 and sft_oracle(result).item() == 0.0

    (result["loss"] + sft_oracle(result)).backward()
    assert policy.weights.grad.tolist() == [0.0, 0.0, 0.0]


def test_policy_equal_to_reference_starts_at_log_two():
    model = to_float64(ZOO["plain-gru"](0))
    case = random_batch(torch.Generator().manual_seed(0), odd=0.0, pattern="prefix")
    assert close(run(model, model, case, sigmoid_loss(0.1))["loss"], log(2))

    case = urn_batch()
    policy, reference = Urn([1, 2, 3]).eval(), Urn([1, 2, 3]).eval()
    run(policy, reference, case, sigmoid_loss(0.1))["loss"].backward()
    assert policy.weights.grad.abs().max() > 0 and reference.weights.grad is None


# the zoo


def random_ids(n: int, seed: int = 0) -> Int[Tensor, "n"]:
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_zoo_is_causal_and_not_degenerate(name: str, dtype: torch.dtype):
    model = ZOO[name](0).to(dtype).eval()
    ids = random_ids(CONTEXT)
    logits = logits_of(model, ids)

    assert logits.shape == (CONTEXT, VOCAB) and logits.dtype == dtype and logits.isfinite().all()
    assert torch.equal(logits, logits_of(model, ids))  # no dropout left
    assert logits.std(dim=-1).min() > 0.2  # tokens differ
    assert logits.std(dim=0).mean() > 0.2  # positions differ
    assert logits.softmax(dim=-1).amax(dim=-1).median() < 0.9  # not saturated

    changed = ids.clone()
    changed[10:] = (changed[10:] + 1) % VOCAB
    other = logits_of(model, changed)
    assert (other - logits)[:10].abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
    assert (other - logits)[10:].abs().amax(dim=-1).min() > 0.1

    # the past is read, and where a token stands: a wrong prefix, or padding taken for a token, shows
    changed = ids[:8].clone()
    changed[0] = (changed[0] + 1) % VOCAB
    assert (logits_of(model, changed)[-1] - logits[7]).abs().max() > 0.01
    assert (logits_of(model, torch.cat((ids[:1], ids[:8])))[-1] - logits[7]).abs().max() > 0.01


@pytest.mark.parametrize("name", ZOO)
def test_zoo_prefix_by_prefix_equals_one_forward(name: str):
    model = to_float64(ZOO[name](1))
    ids = random_ids(9, seed=1)

    scores = torch.stack(token_scores(model, ids, torch.ones(9, dtype=torch.bool)))
    with ExactFloat64():
        log_probs = logits_of(model, ids).log_softmax(dim=-1)
    expected = torch.stack([log_probs[i - 1, ids[i]] for i in range(1, 9)])

    assert torch.allclose(scores, expected, rtol=0, atol=1e-11)
    scores.sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float64 for p in model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("name", ZOO)
def test_zoo_is_seeded(name: str):
    state, python_state = torch.get_rng_state(), random.getstate()
    first, again, other = ZOO[name](3), ZOO[name](3), ZOO[name](4)
    assert torch.equal(state, torch.get_rng_state()) and python_state == random.getstate()

    ids = random_ids(5)
    logits = [logits_of(model.eval(), ids) for model in (first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 0.1
    assert all(parameter.dtype == torch.float32 for parameter in first.parameters())


DROPOUT = {"xt-dropout", "hf-gpt2", "hf-opt", "plain-transformer"}


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_zoo_dropout(name: str):
    model = ZOO[name](0)
    assert model.training
    ids = random_ids(8)
    runs = [logits_of(model, ids) for _ in range(4)]
    assert all(torch.equal(runs[0], other) for other in runs[1:]) == (name not in DROPOUT)


@pytest.mark.parametrize("name", ["xt-dropout", "hf-opt", "plain-transformer"])
@torch.no_grad()
def test_zoo_dropout_out_of_reach(name: str):
    # layer dropout and functional dropout: not switched off through nn.Dropout
    model = ZOO[name](0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    ids = random_ids(8)
    runs = [logits_of(model, ids) for _ in range(20)]
    assert not all(torch.equal(runs[0], other) for other in runs[1:])
    assert torch.equal(logits_of(model.eval(), ids), logits_of(model, ids))


@pytest.mark.parametrize(
    "name, embedding, head",
    [
        ("hf-llama-tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("hf-gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("hf-gemma2", "model.embed_tokens.weight", "lm_head.weight"),
        ("hf-opt", "model.decoder.embed_tokens.weight", "lm_head.weight"),
        ("xt-tied", "token_emb.emb.weight", None),
        ("plain-tied", "embed.weight", None),
    ],
)
def test_zoo_tied_heads_are_tied(name: str, embedding: str, head: str | None):
    model = to_float64(ZOO[name](0))
    weights = dict(model.named_parameters(remove_duplicate=False))
    if head is not None:
        assert weights[head] is weights[embedding]

    # a token that is not in the sequence still moves its own logits, so the embedding is also the head
    before = logits_of(model, ids_of(3, 4))
    with torch.no_grad():
        weights[embedding][20] += 1.0
    moved = (logits_of(model, ids_of(3, 4)) - before).abs().amax(dim=0)
    assert moved[20] > 0.01 and moved.sum() == moved[20]


def test_softcap_and_mixture_bite():
    ids = random_ids(12)
    gemma, mixture = (ZOO[name](0).eval() for name in ("hf-gemma2", "xt-mixture"))
    assert 2.0 < logits_of(gemma, ids).abs().max() < gemma.config.final_logit_softcapping
    assert gemma.config.sliding_window > CONTEXT
    assert torch.allclose(logits_of(mixture, ids).logsumexp(dim=-1), torch.zeros(12), atol=1e-5)


@pytest.mark.slow
def test_importing_the_zoo_is_light():
    heavy = ("transformers", "x_transformers")
    code = f"import sys, helpers.models; sys.exit(any(name in sys.modules for name in {heavy}))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


# the cases


def rows_of(case: Case) -> list[tuple[list[int], list[bool]]]:
    """Real tokens and whether each is prompt, for all rows of both sides."""
    rows = []
    for seqs, prompts, masks in zip(
        (case.preferred_seq, case.unpreferred_seq), case.prompt_masks, case.seq_masks, strict=True
    ):
        rows += [(s[m].tolist(), p[m].tolist()) for s, p, m in zip(seqs, prompts, masks, strict=True)]
    return rows


def some_cases(count: int, **kwargs: object) -> list[Case]:
    return [random_batch(torch.Generator().manual_seed(seed), **kwargs) for seed in range(count)]


def test_cases_have_every_kind():
    cases = some_cases(200)
    rows = [row for case in cases for row in rows_of(case)]

    for case in cases:
        for seq, prompt, mask in zip(
            (case.preferred_seq, case.unpreferred_seq), case.prompt_masks, case.seq_masks, strict=True
        ):
            assert seq.shape == prompt.shape == mask.shape and seq.shape[0] == 3
            assert seq.dtype == torch.long and prompt.dtype == mask.dtype == torch.bool
            assert seq.min() >= 0 and seq.max() < VOCAB and 1 <= seq.shape[1] <= 12

    lengths = [len(ids) for ids, _ in rows]
    assert set(lengths) == set(range(10))
    assert sum(case.preferred_seq.shape != case.unpreferred_seq.shape for case in cases) > 120

    # a row is valid where something after its first token is not prompt; some, not all, pairs are
    valid = [not all(prompt[1:]) for _, prompt in rows]
    assert 0.5 < sum(valid) / len(valid) < 0.95
    assert any(len(ids) > 1 and all(prompt) for ids, prompt in rows)
    assert any(len(ids) > 1 and not any(prompt) for ids, prompt in rows)
    assert any("FTFT" in "".join(str(p)[0] for p in prompt) for _, prompt in rows)

    shared = [p[m][:1].tolist() == u[n][:1].tolist() != [] for p, m, u, n in pairs_of(cases)]
    same = [p[m].tolist() == u[n].tolist() != [] for p, m, u, n in pairs_of(cases)]
    assert 0.3 < sum(shared) / len(shared) < 0.9 and 0 < sum(same) / len(same) < 0.3


def pairs_of(cases: list[Case]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return [
        pair
        for case in cases
        for pair in zip(
            case.preferred_seq, case.seq_masks[0], case.unpreferred_seq, case.seq_masks[1], strict=True
        )
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prompt_patterns(pattern: str):
    for case in some_cases(40, pattern=pattern, odd=0.0):
        for ids, prompt in rows_of(case):
            assert len(ids) >= 2
            assert all(prompt) == (pattern == "all") or pattern in ("turns", "single")
            assert not any(prompt) or pattern != "none"
            assert all(prompt[1:]) == (pattern == "all")  # something to score
            if pattern == "prefix":
                assert prompt == sorted(prompt, reverse=True) and prompt[0]


@pytest.mark.parametrize("padding", PADDINGS)
def test_paddings(padding: str):
    masks = [
        m.tolist()
        for case in some_cases(60, padding=padding, odd=0.0)
        for side in case.seq_masks
        for m in side
    ]
    padded = [m for m in masks if not all(m)]
    assert len(padded) > 50

    left, right = sum(m == sorted(m) for m in padded), sum(m == sorted(m, reverse=True) for m in padded)
    middle = sum(m[0] and m[-1] for m in padded)
    total = dict(left=left, right=right, middle=middle, mixed=0)
    assert total[padding] in (0, len(padded))
    if padding == "mixed":
        assert left and right and middle and left + right + middle < len(padded)


def test_cases_are_reproducible_and_wrong_names_refused():
    first, again = (random_batch(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first.preferred_seq, again.preferred_seq) and rows_of(first) == rows_of(again)

    with pytest.raises(ValueError, match="pattern"):
        random_batch(torch.Generator().manual_seed(0), pattern="suffix")
    with pytest.raises(ValueError, match="padding"):
        random_batch(torch.Generator().manual_seed(0), padding="top")
    with pytest.raises(ValueError, match="side"):
        repad(first, "mixed")


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_repad_moves_padding_only(side: str):
    for case in some_cases(30):
        moved = repad(case, side)
        assert rows_of(moved) == rows_of(case)

        for mask in (mask.tolist() for masks in moved.seq_masks for mask in masks):
            assert mask.count(False) >= 2
            if side == "left":
                assert mask == sorted(mask)
            elif side == "right":
                assert mask == sorted(mask, reverse=True)
            elif sum(mask) >= 2:
                assert mask[0] and mask[-1]


@pytest.mark.parametrize("name", ["xt-absolute", "hf-llama-gqa"])
def test_repad_keeps_the_numbers(name: str):
    policy, reference = (to_float64(ZOO[name](seed)) for seed in (0, 1))

    for case in some_cases(2):
        with torch.no_grad():
            expected = run(policy, reference, case, sigmoid_loss(0.1))
            assert (
                expected["valid"].any()
                and (expected["losses"][expected["valid"]] - log(2)).abs().max() > 1e-3
            )

            for side in ("left", "right", "middle"):
                result = run(policy, reference, repad(case, side), sigmoid_loss(0.1))
                assert result.keys() == expected.keys()
                assert all(torch.equal(result[key], expected[key]) for key in expected)
