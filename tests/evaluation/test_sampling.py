"""Samples are those that the model's own library draws for each prompt alone, token by token."""

import math
from typing import Any

import pytest
import torch

from dpo_wrapper.evaluation.generate import cut_at_end, generate
from dpo_wrapper.evaluation.padding import computes_padding_alike
from dpo_wrapper.evaluation.sampling import Sampling, derive_seed, filter_logits
from helpers.marks import mark_slow_except
from helpers.models import VOCAB, ZOO, seeded

ENDS = [5, 6]
NEW_TOKENS = 6
LENGTHS = (3, 6, 4, 1, 6, 3)
GENERATING = [name for name in ZOO if name.startswith(("xt-", "hf-"))]
FAST = {"xt-rotary", "hf-llama"}


@pytest.fixture(scope="module")
def prompts():
    with seeded(1):
        return [torch.randint(7, VOCAB, (length,)).tolist() for length in LENGTHS]


def sample_alone(model, prompt, seed, sampling):
    """What the model's own library draws for one prompt after `torch.manual_seed`, through its end."""
    ids = torch.tensor([prompt])
    with seeded(seed):
        if hasattr(model, "generation_config"):
            options = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
            options |= {"do_sample": True, "eos_token_id": ENDS, "pad_token_id": ENDS[0]}
            output = model.generate(ids, max_new_tokens=NEW_TOKENS, **options)[:, ids.shape[1] :]
        else:
            from x_transformers import AutoregressiveWrapper

            filters: dict[str, Any] = {"filter_logits_fn": lambda logits: logits}
            if sampling.top_k:
                filters = {
                    "filter_logits_fn": "top_k",
                    "filter_kwargs": {"k": sampling.top_k},
                }
            elif sampling.top_p < 1:
                filters = {
                    "filter_logits_fn": "top_p",
                    "filter_kwargs": {"thres": sampling.top_p},
                }
            wrapper = AutoregressiveWrapper(getattr(model, "net", model))
            output = wrapper.generate(ids, NEW_TOKENS, temperature=sampling.temperature, **filters)
    return cut_at_end(output[0].tolist(), ENDS)


@pytest.mark.parametrize("pads", (False, True))
@pytest.mark.parametrize("name", mark_slow_except(FAST, GENERATING))
@pytest.mark.parametrize(
    "sampling",
    (Sampling(seed=1), Sampling(temperature=0.7, top_k=9, seed=2), Sampling(top_p=0.8)),
    ids=("plain", "top-k", "top-p"),
)
def test_samples_are_those_of_the_models_library(name, sampling, pads, prompts):
    model = ZOO[name](0).eval()
    given = generate(model, prompts, NEW_TOKENS, ENDS, sampling=sampling, pads=pads)
    seeds = [derive_seed(sampling.seed, number) for number in range(len(prompts))]
    expected = [sample_alone(model, *pair, sampling) for pair in zip(prompts, seeds, strict=True)]
    assert given == expected
    assert given != generate(model, prompts, NEW_TOKENS, ENDS)


def test_temperature_top_k_and_top_p_together_are_those_of_transformers(prompts):
    model, sampling = ZOO["hf-llama"](0).eval(), Sampling(temperature=2.0, top_k=20, top_p=0.9, seed=7)
    given = generate(model, prompts, NEW_TOKENS, ENDS, sampling=sampling, seeds=range(len(prompts)))
    assert given == [sample_alone(model, prompt, k, sampling) for k, prompt in enumerate(prompts)]


def test_a_sample_depends_on_its_seed_and_prompt_alone(prompts):
    model, sampling = ZOO["hf-llama"](0), Sampling(seed=3)
    state = torch.get_rng_state()
    given = generate(model, prompts, NEW_TOKENS, ENDS, sampling=sampling, pads=True)
    assert torch.equal(torch.get_rng_state(), state)
    seeds = [derive_seed(3, number) for number in range(len(prompts))]
    later = generate(model, prompts[4:], NEW_TOKENS, ENDS, sampling=sampling, seeds=seeds[4:])
    assert later == given[4:]


def test_a_prompt_that_holds_an_end_is_continued_through_the_next():
    model = ZOO["xt-rotary"](0).eval()
    [expected] = generate(model, [[9, 12, 8]], NEW_TOKENS, [0])
    assert len(expected) > 1
    end = expected[-1]
    prompts = [[end, 9, 12, 8], [9, 12, 8]]
    alone = [generate(model, [prompt], NEW_TOKENS, [end])[0] for prompt in prompts]
    assert generate(model, prompts, NEW_TOKENS, [end], pads=True) == alone
    assert alone[1] == cut_at_end(expected, [end])


def test_filtered_logits_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None]
    kept = filter_logits(logits, Sampling(top_k=2)).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.5, 0.25, 0.0, 0.0]]))
    kept = filter_logits(logits, Sampling(top_p=0.7)).exp()  # 0.5 is not enough, 0.75 is
    torch.testing.assert_close(kept, torch.tensor([[0.5, 0.25, 0.0, 0.0]]))
    squared = filter_logits(logits, Sampling(temperature=0.5, top_p=0.8)).softmax(-1)  # 16 : 4 : 1 : 1
    torch.testing.assert_close(squared, torch.tensor([[0.8, 0.2, 0.0, 0.0]]))
    assert filter_logits(logits, Sampling(top_p=1e-9)).isfinite().sum() == 1  # one token stays


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": 0.0}, r"temperature should be .* above 0, but it is 0\.0"),
        ({"temperature": math.inf}, "temperature should be"),
        ({"top_p": 0.0}, r"top_p should be above 0 and at most 1, but it is 0\.0"),
        ({"top_k": -1}, "top_k should be 0 or more, but it is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        Sampling(**options)


def test_seeds_of_many_streams_differ_and_stay_the_same():
    seeds = {derive_seed(seed, row, number) for seed in range(3) for row in range(3) for number in range(3)}
    assert len(seeds) == 27 and max(seeds) < 2**48
    assert derive_seed(0, 1, 2) == derive_seed(0, 1, 2)


@pytest.mark.parametrize("name", mark_slow_except(FAST, GENERATING))
def test_models_with_attention_alone_compute_padding_alike(name):
    assert computes_padding_alike(ZOO[name](0), range(7, 20))


def test_a_model_that_mixes_tokens_outside_of_attention_does_not_compute_padding_alike():
    from helpers.models import x_transformer

    shifted = x_transformer(0, decoder={"rotary_pos_emb": True, "shift_tokens": 1})
    assert not computes_padding_alike(shifted, range(7, 20))
    assert computes_padding_alike(shifted, [7])  # nothing to pad
