"""Policies with PEFT's adapters."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from dpo_wrapper import DPO
from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.models.eval_mode import reproducible_forward
from dpo_wrapper.scoring.scorer import Scorer
from helpers.marks import mark_slow_except
from helpers.models import VOCAB, ZOO, hf_llama, seeded
from helpers.naive_dpo import ARGUMENTS, assert_reference_stays, reference_log_probs, train


def add_lora(model: nn.Module, targets: str = "q_proj", trained: str = "", **kwargs: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    with seeded(0):
        kwargs = {"r": 2, "lora_dropout": 0.5} | kwargs
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets.split(), **kwargs))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if trained and any(part in name for part in trained.split()):
                    p += 0.3 * torch.randn_like(p)
    return model


def with_two_adapters(active: str) -> nn.Module:
    import peft

    model = add_lora(hf_llama(0), trained="lora_B")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(active)
    return model


def with_prefix_tuning() -> nn.Module:
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(hf_llama(0), config)


# whether the policy with its adapter off may serve as reference; whether the head may be used alone
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], bool, bool]] = {
    "fresh": (lambda: add_lora(hf_llama(0)), True, True),
    "trained": (lambda: add_lora(hf_llama(0), trained="lora_B"), False, True),
    "on the head": (lambda: add_lora(hf_llama(0), "q_proj lm_head"), True, False),
    "on the head, trained": (lambda: add_lora(hf_llama(0), "q_proj lm_head", "lora_B"), False, False),
    "on a tied head": (lambda: add_lora(ZOO["hf-llama-tied"](0), "lm_head", "lora_B"), False, False),
    "on the embedding": (lambda: add_lora(hf_llama(0), "embed_tokens"), True, True),
    "on the embedding, trained": (lambda: add_lora(hf_llama(0), "embed_tokens", "embedding_A"), False, True),
    "modules_to_save": (lambda: add_lora(hf_llama(0), modules_to_save=["lm_head"]), False, False),
    "DoRA": (lambda: add_lora(hf_llama(0), use_dora=True), False, True),
    "DoRA, magnitudes trained": (
        lambda: add_lora(hf_llama(0), trained="magnitude", use_dora=True),
        False,
        True,
    ),
    "tokens": (lambda: add_lora(hf_llama(0), trainable_token_indices=[1, 2]), False, True),
    "two, the trained one active": (lambda: with_two_adapters("default"), False, True),
    "two, the fresh one active": (lambda: with_two_adapters("other"), False, True),
    "prefix": (with_prefix_tuning, False, False),
    "x-transformers": (lambda: add_lora(ZOO["xt-rotary"](0), "to_q"), True, True),
    "x-transformers, trained": (lambda: add_lora(ZOO["xt-wrapped"](0), "to_q", "lora_B"), False, True),
    "x-transformers, head": (lambda: add_lora(ZOO["xt-rotary"](0), "to_q to_logits"), True, False),
    "x-transformers, tied": (
        lambda: add_lora(ZOO["xt-tied"](0), "token_emb.emb", "embedding_A"),
        False,
        True,
    ),
    "plain": (lambda: add_lora(ZOO["plain-transformer"](0), "linear1"), True, False),
}
FAST = {"fresh", "trained", "on the head, trained", "on a tied head", "modules_to_save", "DoRA"}
FAST |= {"two, the fresh one active", "prefix", "x-transformers", "plain"}


@pytest.mark.pitfall(5, 6)
@pytest.mark.filterwarnings("ignore:.*all logits|.*tie_word_embeddings|.*tied")
@pytest.mark.parametrize("name", mark_slow_except(FAST, ADAPTERS))
def test_adapters_start_at_their_reference(name):
    pytest.importorskip("peft")
    make, is_reference, head_applies = ADAPTERS[name]
    dpo = DPO(make())
    assert_reference_stays(dpo)
    assert (dpo.ref_model is None) == is_reference
    assert dpo.policy.probe.head_applies == head_applies
    trained = [p for p in dpo.policy_model.parameters() if p.requires_grad]
    dpo(**ARGUMENTS).backward()
    assert trained and all(p.grad is not None for p in trained)


@pytest.mark.pitfall(19)
@pytest.mark.filterwarnings("ignore:.*all logits|.*tie_word_embeddings|.*tied|.*prefixes are not shared")
@pytest.mark.parametrize("name", mark_slow_except(FAST, ADAPTERS))
def test_adapters_get_the_gradients_of_the_models_own_logits(name):
    pytest.importorskip("peft")
    policy = ADAPTERS[name][0]().double()
    policy.eval()
    seq = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
    seq[1, :5], seq[3, :5] = seq[0, :5], seq[2, :5]
    answers = torch.arange(9).expand(4, -1) >= 5
    inner = policy
    if name.startswith("x-transformers"):  # without the wrapper, which gives a loss
        inner = getattr(policy.get_base_model(), "net", policy.get_base_model())
    with reproducible_forward(policy):  # without torch's fast path in eval mode, which leaves adapters out
        logits = inner(seq)
    logits = getattr(logits, "logits", logits)[:, -9:-1].log_softmax(dim=-1)
    expected = logits.gather(-1, seq[:, 1:, None])[..., 0].masked_fill(~answers[:, 1:], 0.0).sum(dim=-1)

    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    weights = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
    scorer = Scorer(policy, share_prefix="auto")
    sums = scorer(ScoredSequences.from_padded(seq, answers, torch.ones_like(answers))).sums
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-8)
    gradients, expected_gradients = (
        torch.autograd.grad(values @ weights, list(trained.values()), allow_unused=True)
        for values in (sums, expected)
    )
    for key, gradient, truth in zip(trained, gradients, expected_gradients, strict=True):
        assert (gradient is None) == (truth is None), key
        if truth is not None:
            torch.testing.assert_close(
                gradient, truth, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert any(truth is not None and truth.any() for truth in expected_gradients)


def test_the_reference_of_an_adapter_has_no_dropout_though_the_policy_has():
    policy = add_lora(ZOO["hf-gpt2"](0), "c_attn", fan_in_fan_out=True).train()
    dpo = DPO(policy, disable_dropout=False)
    assert dpo.ref_model is None
    assert len({reference_log_probs(dpo) for _ in range(4)}) == 1
    assert len({dpo(**ARGUMENTS).item() for _ in range(4)}) == 4
    assert all(module.training for module in policy.modules())


def test_what_is_frozen_in_an_adapter_stays_so():
    """PEFT lets all of an adapter train once it is switched on again."""
    policy = add_lora(hf_llama(0))
    for name, p in policy.named_parameters():
        p.requires_grad_("lora_B" in name)
    dpo = DPO(policy)
    assert dpo.ref_model is None
    train(dpo, steps=2)
    assert {name.split(".")[-3] for name, p in policy.named_parameters() if p.requires_grad} == {"lora_B"}


@pytest.mark.pitfall(24)
@pytest.mark.parametrize(
    "reference, reentrant",
    mark_slow_except([("adapter", False), ("copy", True)], product(["adapter", "copy"], [False, True])),
)
def test_adapters_get_the_same_gradients_with_activation_checkpointing(reference, reentrant):
    results = []
    for checkpointed in (False, True):
        policy = add_lora(hf_llama(0)).train()
        if checkpointed:
            policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
            policy.enable_input_require_grads()
        dpo = DPO(policy, reference=reference).train()
        train(dpo, steps=2)
        dpo(**ARGUMENTS).backward()
        results.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert len(results[0]) == len(results[1]) == 4
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])
