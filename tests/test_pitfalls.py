"""Lines of docs/pitfalls.md. Other tests that guard some are marked with their numbers where they stand."""

import math
from itertools import product

import pytest
import torch
from torch import Generator, nn
from torch.utils.checkpoint import checkpoint

from dpo_wrapper import DPO, IPO, SFT, PreferenceBatch, Sigmoid, SigmoidNorm, SimPO, sequence_log_probs
from helpers.batches import random_batch
from helpers.dpo_calls import LN2, arguments, nudged
from helpers.marks import mark_slow_except
from helpers.models import ZOO


class Bigram(nn.Module):
    """log p(next | this), one row a token: everything about it can be looked up."""

    def __init__(self, vocab=7):
        super().__init__()
        generator = Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=generator))

    def forward(self, ids):
        return self.table[ids]

    def log_p(self, this, following):
        return self.table[this].log_softmax(-1)[following]


NO_PROMPT = torch.zeros(1, 4, dtype=torch.bool)


@pytest.mark.pitfall(1)
@pytest.mark.parametrize("place", [1, 2, 3])
def test_one_scored_token_scores_that_token(place):
    model, seq = Bigram(), torch.tensor([[1, 5, 2, 6]])
    scored = torch.zeros(1, 4, dtype=torch.bool)
    scored[0, place] = True
    expected = model.log_p(seq[0, place - 1], seq[0, place])
    assert torch.allclose(sequence_log_probs(model, seq, scored), expected)


@pytest.mark.pitfall(1)
def test_x_transformers_scores_the_wrong_tokens():
    """x-transformers 2.31 crops the mask as it crops the inputs, but what it masks are targets.

    Given a mask that is moved by one beforehand it agrees with `SigmoidNorm`; given the mask it asks for, it
    leaves out the first token of the completion.
    """
    theirs_class = pytest.importorskip("x_transformers.dpo").DPO
    policy = ZOO["xt-absolute"](0)
    ours = DPO(policy, loss=SigmoidNorm(0.1))
    theirs = theirs_class(ZOO["xt-absolute"](0), beta=0.1)
    nudged(policy, 0.1), nudged(theirs.policy_model, 0.1)

    generator = Generator().manual_seed(0)
    chosen, rejected = (torch.randint(0, 37, (3, 10), generator=generator) for _ in range(2))
    prompt = torch.arange(10).expand(3, -1) < 4
    moved = torch.arange(10).expand(3, -1) < 3

    right = ours(chosen, rejected, prompt)
    assert torch.allclose(theirs(chosen, rejected, prompt_mask=moved), right, atol=1e-6)
    wrong = theirs(chosen, rejected, prompt_mask=prompt)
    assert abs(wrong - right) > 1e-4
    # with the mask it asks for, the first token of the completion is the one that is lost
    first_lost = torch.arange(10).expand(3, -1) < 5
    assert torch.allclose(wrong, ours(chosen, rejected, first_lost), atol=1e-6)


@pytest.mark.pitfall(2)
def test_logits_are_shifted():
    model, seq = Bigram(), torch.tensor([[1, 5, 2, 6]])
    expected = sum(model.log_p(seq[0, i], seq[0, i + 1]) for i in range(3))
    assert torch.allclose(sequence_log_probs(model, seq, ~NO_PROMPT), expected)


@pytest.mark.pitfall(3)
def test_each_side_has_its_own_prompt():
    model = Bigram()
    dpo = DPO(model, reference=Bigram().requires_grad_(False), loss=SimPO(beta=1.0, gamma=0.0))
    chosen, rejected = torch.tensor([[1, 5, 2, 6]]), torch.tensor([[3, 4, 1, 0]])
    one, three = (torch.arange(4)[None] < n for n in (1, 3))
    p_w = sum(model.log_p(chosen[0, i], chosen[0, i + 1]) for i in range(3)) / 3
    p_l = model.log_p(rejected[0, 2], rejected[0, 3])
    assert torch.allclose(dpo(chosen, rejected, (one, three)), -(p_w - p_l).sigmoid().log())


@pytest.mark.pitfall(4, 5)
def test_tied_heads_and_dropout():
    """At length in test_reference.py and test_dpo.py; here both at once, in train mode."""
    from x_transformers import Decoder, TransformerWrapper

    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=2, heads=2, attn_dropout=0.5, ff_dropout=0.5)
    model = TransformerWrapper(num_tokens=37, max_seq_len=24, tie_embedding=True, attn_layers=layers).train()
    dpo = DPO(model).train()
    case = random_batch(Generator().manual_seed(0), odd=0)
    loss, before = dpo(**arguments(case), return_metrics=True)
    assert abs(loss - LN2) < 1e-6
    nudged(model, 0.3)
    loss, after = dpo(**arguments(case), return_metrics=True)
    assert after["logps/ref_chosen"] == before["logps/ref_chosen"] and abs(loss - LN2) > 1e-4


def gradients(dpo, **kwargs):
    dpo.zero_grad()
    loss, metrics = dpo(**kwargs, return_metrics=True)
    loss.backward()
    return loss.detach(), metrics, [p.grad.clone() for p in dpo.policy_model.parameters()]


@pytest.mark.pitfall(7, 8)
@pytest.mark.parametrize("loss", [Sigmoid(), IPO(), SimPO(), [(Sigmoid(), 1.0), (SFT(), 0.7)]], ids=str)
def test_a_pair_without_a_completion_changes_nothing(loss):
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0), loss=loss)
    seqs = [torch.randint(1, 37, (3, n), generator=Generator().manual_seed(n)) for n in (8, 6)]
    prompts = [torch.arange(n).expand(3, -1) < 2 for n in (8, 6)]
    reals = [torch.ones_like(mask) for mask in prompts]
    without = gradients(
        dpo,
        preferred_seq=seqs[0][:2],
        unpreferred_seq=seqs[1][:2],
        prompt_mask=tuple(m[:2] for m in prompts),
        seq_mask=tuple(m[:2] for m in reals),
    )
    for side, empty in ((0, "prompt"), (1, "prompt"), (0, "padding"), (1, "padding")):
        masks, kept = [m.clone() for m in prompts], [m.clone() for m in reals]
        if empty == "prompt":
            masks[side][2] = True
        else:
            kept[side][2] = False
        with_empty = gradients(
            dpo,
            preferred_seq=seqs[0],
            unpreferred_seq=seqs[1],
            prompt_mask=tuple(masks),
            seq_mask=tuple(kept),
        )
        assert torch.allclose(without[0], with_empty[0], atol=1e-6)
        assert with_empty[1]["pairs/valid"] == 2
        for name in without[1]:
            if not name.startswith("tokens/"):
                assert torch.allclose(without[1][name], with_empty[1][name], rtol=1e-4, atol=1e-6), name
        for a, b in zip(without[2], with_empty[2], strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.pitfall(7)
@pytest.mark.parametrize("name", ["xt-tied", "hf-llama", "plain-gru"])
def test_no_valid_pair_is_a_zero_with_zero_gradients(name):
    dpo = DPO(ZOO[name](0))
    case = random_batch(Generator().manual_seed(0), pattern="all")
    loss, metrics, grads = gradients(dpo, **arguments(case))
    assert loss == 0 and all((g == 0).all() for g in grads)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.pitfall(16)
@pytest.mark.parametrize(
    "loss", [Sigmoid(), SigmoidNorm(), IPO(), SimPO(), [(SFT(), 1.0), (IPO(), 1.0)]], ids=str
)
def test_padding_changes_no_loss(loss):
    dpo = DPO(nudged(ZOO["xt-absolute"](0)), reference=ZOO["xt-absolute"](0), loss=loss)
    chosen, rejected = torch.randint(1, 37, (2, 7)), torch.randint(1, 37, (2, 5))
    mask = torch.arange(12).expand(2, -1) < 2
    bare = dpo(chosen, rejected, mask[:, :7])
    padded = [torch.nn.functional.pad(seq, (0, 12 - seq.shape[1]), value=36) for seq in (chosen, rejected)]
    reals = tuple(torch.arange(12).expand(2, -1) < n for n in (7, 5))
    assert torch.allclose(dpo(*padded, mask, reals), bare, atol=1e-7)


@pytest.mark.pitfall(17)
def test_finite_where_the_policy_is_certain_and_wrong():
    """Logits of ±1e4: log-probs of 0 and of about -1e4 a token, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for loss in (Sigmoid(), SigmoidNorm(), IPO(), SimPO(), SFT()):
            model = Bigram().to(dtype)
            with torch.no_grad():
                model.table.copy_((10_000 * torch.eye(7)).to(dtype))
            dpo = DPO(model, loss=loss, reference=Bigram().to(dtype).requires_grad_(False))
            value = dpo(torch.tensor([[1, 1, 1, 1]]), torch.tensor([[1, 2, 3, 4]]), NO_PROMPT)
            value.backward()
            assert value.dtype == torch.float32
            assert value.isfinite() and model.table.grad.isfinite().all()


@pytest.mark.pitfall(20)
@pytest.mark.parametrize("name", ["xt-absolute", "hf-gpt2", "hf-opt", "plain-transformer"])
def test_left_padding_on_learned_positions(name):
    """Padding up to the last position of the table: a position counted from the padding would fall off it."""
    dpo = DPO(nudged(ZOO[name](0)), reference=ZOO[name](0))
    chosen, rejected = (torch.randint(2, 37, (2, n), generator=Generator().manual_seed(n)) for n in (6, 9))
    mask = torch.arange(30).expand(2, -1)
    bare = dpo(chosen, rejected, mask[:, :9] < 2)
    padded = [torch.nn.functional.pad(seq, (30 - seq.shape[1], 0), value=1) for seq in (chosen, rejected)]
    prompts = tuple(mask < 30 - n + 2 for n in (6, 9))
    reals = tuple(mask >= 30 - n for n in (6, 9))
    loss = dpo(*padded, prompts, reals)
    assert loss == bare and loss.isfinite()


@pytest.mark.pitfall(21)
def test_each_sides_log_prob_and_its_change_are_reported():
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0), beta=0.2)
    metrics = dpo(**arguments(random_batch(Generator().manual_seed(0), odd=0)), return_metrics=True)[1]
    for side in ("chosen", "rejected"):
        change = metrics[f"logps/{side}"] - metrics[f"logps/ref_{side}"]
        assert torch.allclose(metrics[f"rewards/{side}"], 0.2 * change, atol=1e-6)


@pytest.mark.pitfall(23)
@pytest.mark.parametrize(
    "loss", [Sigmoid(), [(Sigmoid(), 1.0), (SFT(), 0.7)]], ids=["sigmoid", "sigmoid + sft"]
)
def test_the_parts_of_a_step_add_up_to_the_step(loss):
    """Pairs of quite different lengths, and one that is not valid, in one batch and in parts."""
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0), loss=loss)
    seqs = tuple(torch.randint(1, 37, (4, n), generator=Generator().manual_seed(n)) for n in (12, 9))
    prompts = (
        torch.arange(12) < torch.tensor([[1], [9], [12], [5]]),
        torch.arange(9) < torch.tensor([[1]] * 4),
    )
    reals = tuple(torch.ones_like(mask) for mask in prompts)
    whole = gradients(
        dpo, preferred_seq=seqs[0], unpreferred_seq=seqs[1], prompt_mask=prompts, seq_mask=reals
    )

    def part(start, stop):
        return PreferenceBatch.from_padded(
            *(tuple(t[start:stop] for t in ts) for ts in (seqs, prompts, reals))
        )

    totals = part(0, 4).step_totals()
    assert totals[:2] == (3, 11 + 3 + 7)
    for sizes in ((4,), (1, 1, 1, 1), (3, 1), (1, 2, 1)):
        dpo.zero_grad()
        loss_of_parts, start = 0.0, 0
        for size in sizes:
            share = dpo(part(start, start + size).with_step_totals(*totals))
            share.backward()
            loss_of_parts, start = loss_of_parts + share.detach(), start + size
        assert torch.allclose(loss_of_parts, whole[0], atol=1e-6)
        for p, grad in zip(dpo.policy_model.parameters(), whole[2], strict=True):
            assert torch.allclose(p.grad, grad, atol=1e-6)


@pytest.mark.pitfall(24)
@pytest.mark.parametrize(
    "name, reentrant",
    mark_slow_except(
        [("hf-llama", True), ("hf-opt", False)],
        product(["hf-llama", "hf-gpt2", "hf-opt"], [False, True]),
    ),
)
def test_activation_checkpointing_changes_nothing(name, reentrant):
    plain, checkpointed = ZOO[name](0).train(), ZOO[name](0).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    case = random_batch(Generator().manual_seed(0), odd=0)
    expected, *_, expected_grads = gradients(DPO(plain).train(), **arguments(case))
    dpo, runs = DPO(checkpointed).train(), []
    layer = next(m for m in dpo.policy_model.modules() if isinstance(m, nn.ModuleList))[0]
    next(layer.children()).register_forward_hook(lambda *_: runs.append(1))
    dpo(**arguments(case))  # looks at the model
    runs.clear()
    loss, *_, grads = gradients(dpo, **arguments(case))
    assert len(runs) == 2, "each layer runs again in backward"
    assert torch.allclose(loss, expected, atol=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.pitfall(24)
def test_checkpointing_in_a_plain_module():
    class Checkpointed(nn.Module):
        def __init__(self, use):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head, self.use = nn.Embedding(37, 8), nn.Linear(8, 37), use
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 8))

        def forward(self, ids):
            x = self.embedding(ids)
            return self.head(checkpoint(self.inner, x, use_reentrant=False) if self.use else self.inner(x))

    case = random_batch(Generator().manual_seed(0), odd=0)
    results = [gradients(DPO(Checkpointed(use)).train(), **arguments(case)) for use in (False, True)]
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.pitfall(25)
def test_options_that_cannot_act_raise():
    with pytest.raises(ValueError, match=r"prefixes are not shared.*use share_prefix = 'auto'"):
        DPO(Bigram(), share_prefix=True)(torch.ones(1, 4).long(), torch.zeros(1, 4).long(), NO_PROMPT)
    with pytest.raises((ValueError, ImportError), match=r"should be (on CUDA|installed) for impl = 'triton'"):
        DPO(Bigram(), log_prob_impl="triton")(torch.ones(1, 4).long(), torch.zeros(1, 4).long(), NO_PROMPT)
    with pytest.raises(ValueError, match="has no effect beside a loss"):
        DPO(Bigram(), beta=0.3, loss=IPO(0.2))


@pytest.mark.pitfall(26)
def test_parameters_and_named_parameters_agree():
    dpo = DPO(ZOO["xt-rotary"](0))
    assert type(dpo).parameters is nn.Module.parameters
    assert [id(p) for p in dpo.parameters()] == [id(p) for _, p in dpo.named_parameters()]
    assert not any(p.requires_grad for p in dpo.ref_model.parameters())
