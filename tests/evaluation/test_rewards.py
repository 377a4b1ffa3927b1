"""Rewards of completions against the float64 oracle, whatever stands for policy and reference."""

import pytest
import torch

from dpo_wrapper.data import Message, load_tokenizer
from dpo_wrapper.evaluation import reward
from dpo_wrapper.evaluation.completion_scores import score_completions
from dpo_wrapper.evaluation.model_pair import load_model_pair, make_dpo
from dpo_wrapper.evaluation.prompts import encode_completions
from dpo_wrapper.losses import Sigmoid, SimPO
from dpo_wrapper.losses.registry import builtin_losses
from dpo_wrapper.pretrained import load_pretrained
from helpers.lora_runs import save_llama
from helpers.oracle import sequence_score, to_float64

PROMPT, TEXTS = "Say it.", ["it", "it, I would say", ""]


def oracle_sum(model, prompt, completion):
    """The log-prob of a completion and its end after a prompt, as bytes."""
    ids = torch.tensor([*prompt, *completion])
    is_prompt = torch.arange(len(ids)) < len(prompt)
    total, count = sequence_score(model, ids, is_prompt, torch.ones_like(is_prompt))
    return float(total), count


def oracle_rewards(policy, reference, prompt=PROMPT):
    tokenizer = load_tokenizer("bytes")
    ids, ends = tokenizer.encode_prompt(prompt), [[*text.encode(), 257] for text in TEXTS]
    return [0.1 * (oracle_sum(policy, ids, x)[0] - oracle_sum(reference, ids, x)[0]) for x in ends]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second Llama with other weights."""
    return save_llama(tmp_path_factory.mktemp("other") / "base", tie_word_embeddings=True)


def load(folder):
    return load_pretrained(str(folder), None, 128).model


@pytest.mark.slow
def test_rewards_of_named_models_and_of_modules_are_the_oracles(llama, other):
    expected = oracle_rewards(to_float64(load(llama)), to_float64(load(other)))
    assert reward(str(llama), str(other), PROMPT, TEXTS) == pytest.approx(expected, abs=1e-5)
    modules = load(llama), load(other)
    assert reward(*modules, PROMPT, TEXTS, tokenizer="bytes") == pytest.approx(expected, abs=1e-5)
    assert reward(*modules, PROMPT, TEXTS[1], tokenizer="bytes") == pytest.approx(expected[1], abs=1e-5)


@pytest.mark.slow
def test_a_run_without_a_name_for_its_reference_and_an_adapter_agree_with_the_oracle(lora_run, llama):
    policy = load(lora_run)
    expected = oracle_rewards(to_float64(policy), to_float64(load(llama)))
    pair = load_model_pair(str(lora_run))
    for model in (str(lora_run), pair):
        assert reward(model, None, PROMPT, TEXTS) == pytest.approx(expected, abs=1e-5)
    scaled = reward(pair, None, PROMPT, TEXTS, loss=Sigmoid(0.2))
    assert scaled == pytest.approx([2 * value for value in expected], abs=1e-5)
    given = reward(load(lora_run), "adapter", PROMPT, TEXTS, tokenizer="bytes")
    assert given == pytest.approx(expected, abs=1e-5) and max(map(abs, given)) > 1e-3


def test_rewards_are_those_of_the_loss(llama):
    model = load(llama)
    dialogue = [{"role": "user", "content": PROMPT}]
    ids = load_tokenizer("bytes").encode_prompt((Message("user", PROMPT),))
    total, count = oracle_sum(to_float64(load(llama)), ids, [*b"it", 257])
    value = reward(model, None, dialogue, "it", tokenizer="bytes", loss=SimPO(beta=2.0))
    assert value == pytest.approx(2.0 * total / count, abs=1e-4)


def test_completions_are_scored_in_their_order_whatever_the_batches(llama, other):
    pair = load_model_pair(str(llama), str(other))
    prompts = ["b", "a", "b"]
    examples = encode_completions(pair.tokenizer, prompts, [["x", "yy"], ["z"], ["x", "w", "yy"]])
    seen = []
    whole, parts = (score_completions(pair.dpo, examples, n, seen.append) for n in (16384, 5))
    assert seen == [3, 1, 1, 1]
    for name in ("policy", "reference", "reward", "length"):
        one, two = getattr(whole, name), getattr(parts, name)
        assert one == pytest.approx(two, rel=1e-4)
        assert one[[0, 1]] == pytest.approx(one[[3, 5]], rel=1e-4)
    assert whole.policy[4] != whole.policy[3]
    assert whole.length.tolist() == [2, 3, 2, 2, 2, 3]
    assert whole.reward == pytest.approx(0.1 * (whole.policy - whole.reference), abs=1e-5)


def test_what_cannot_be_scored_is_refused(llama):
    model = load(llama)
    with pytest.raises(TypeError, match="completion should be a text or a list of texts"):
        reward(model, None, PROMPT, [1, 2], tokenizer="bytes")
    with pytest.raises(ValueError, match="completion should hold at least one text"):
        reward(model, None, PROMPT, [], tokenizer="bytes")
    with pytest.raises(TypeError, match="reference should be a module, 'adapter', 'none' or None"):
        reward(model, str(llama), PROMPT, "x", tokenizer="bytes")
    with pytest.raises(TypeError, match="reference should be a name or None"):
        reward(str(llama), model, PROMPT, "x")
    with pytest.raises(TypeError, match="reference should be None beside a ModelPair"):
        reward(load_model_pair(str(llama)), "none", PROMPT, "x")
    with pytest.raises(ValueError, match="this model has none: give the reference as a module"):
        reward(model, "adapter", PROMPT, "x", tokenizer="bytes")
    with pytest.raises(ValueError, match="the tokenizer should be given"):
        model.config._name_or_path = ""
        reward(model, None, PROMPT, "x")


def test_every_loss_has_rewards(llama, other):
    """Those that it says itself, of pairs too where it learns from lists or labels; `SFT` has DPO's."""
    policy, reference = load(llama), load(other)
    tokenizer = load_tokenizer("bytes")
    examples = encode_completions(tokenizer, ["a", "b"], [["x", "yy"], ["z", ""]])
    for loss_class in builtin_losses():
        scores = score_completions(make_dpo(policy, reference, loss_class()), examples)
        loss = loss_class() if loss_class.has_rewards else Sigmoid()
        columns = [torch.from_numpy(one) for one in (scores.policy, scores.reference, scores.length)]
        assert scores.reward == pytest.approx(loss.reward(*columns).numpy(), rel=1e-3, abs=1e-5), loss
