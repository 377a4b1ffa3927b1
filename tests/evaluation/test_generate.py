"""Greedy completions of many prompts are those of a plain loop over logits, and leave the model as it was."""

import pytest
import torch
from torch import nn

from dpo_wrapper import DPO
from dpo_wrapper.evaluation.generate import cut_at_end, generate
from dpo_wrapper.models import language_model
from dpo_wrapper.reference.reference import AdapterDisabled
from helpers.adapters import lora
from helpers.models import CONTEXT, VOCAB, ZOO, seeded

GENERATING = [name for name in ZOO if name.startswith(("xt-", "hf-"))]
END = 5
NEW_TOKENS = 8


def draw_prompts(lengths):
    with seeded(1):
        return [torch.randint(6, VOCAB, (length,)).tolist() for length in lengths]


@torch.no_grad()
def continue_plainly(model, prompt, max_new_tokens, end_ids):
    """The completion by a forward pass over the whole sequence for each token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(int(language_model(model).forward_logits(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in end_ids:
            break
    return ids[len(prompt) :]


def list_modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("name", GENERATING)
def test_completions_are_those_of_a_plain_loop(name):
    model = ZOO[name](0)
    prompts = draw_prompts((3, 7, 3, 1, 7, 3))
    given = generate(model.train(), prompts, NEW_TOKENS, [END])
    model.eval()
    expected = [continue_plainly(model, prompt, NEW_TOKENS, [END]) for prompt in prompts]
    assert given == expected
    assert len(set(map(tuple, given))) > 1


@pytest.mark.parametrize("name", ("xt-rotary", "hf-llama"))
def test_a_completion_goes_through_its_first_end_token(name):
    model, prompts = ZOO[name](0).eval(), draw_prompts((4, 4, 4, 4))
    unbounded = [continue_plainly(model, prompt, NEW_TOKENS, []) for prompt in prompts]
    ends = [unbounded[0][2], unbounded[1][4]]
    expected = [cut_at_end(completion, ends) for completion in unbounded]
    assert generate(model, prompts, NEW_TOKENS, ends) == expected
    assert len(expected[0]) <= 3 and expected[0][-1] in ends
    assert cut_at_end([4, 2, 9, 2], [2, 9]) == [4, 2] and cut_at_end([4], [2]) == [4]


def test_many_prompts_of_one_length_are_continued_in_parts(monkeypatch):
    monkeypatch.setattr("dpo_wrapper.evaluation.generate.MAX_BATCH_SIZE", 2)
    model, prompts = ZOO["xt-rotary"](0).eval(), draw_prompts((4, 4, 2, 4, 4, 4))
    done = []
    given = generate(model, prompts, NEW_TOKENS, [END], progress=done.append)
    assert given == [continue_plainly(model, prompt, NEW_TOKENS, [END]) for prompt in prompts]
    assert done == [1, 2, 2, 1]


@pytest.mark.parametrize("name", ("xt-rotary", "xt-alibi"))
def test_a_decoder_without_a_table_of_positions_goes_on_beyond_its_context(name):
    model, prompts = ZOO[name](0).eval(), draw_prompts((CONTEXT - 2,))
    given = generate(model, prompts, NEW_TOKENS, [END])
    assert given == [continue_plainly(model, prompts[0], NEW_TOKENS, [END])]


@pytest.mark.parametrize("name", ("xt-absolute", "hf-gpt2"))
def test_a_prompt_that_leaves_no_room_loses_its_front(name):
    model, (prompt,) = ZOO[name](0).eval(), draw_prompts((CONTEXT + 9,))
    given = generate(model, [prompt], NEW_TOKENS, [END], max_positions=CONTEXT)
    assert given == [continue_plainly(model, prompt[-(CONTEXT - NEW_TOKENS) :], NEW_TOKENS, [END])]


def test_defaults_of_a_generation_config_do_not_change_what_is_most_likely():
    from transformers import GenerationConfig

    model, prompts = ZOO["hf-llama"](0).eval(), draw_prompts((4, 6))
    expected = [continue_plainly(model, prompt, NEW_TOKENS, [END]) for prompt in prompts]
    own = GenerationConfig(repetition_penalty=5.0, suppress_tokens=[expected[0][0]], min_length=20)
    model.generation_config = own
    assert generate(model, prompts, NEW_TOKENS, [END]) == expected
    assert model.generation_config is own


class MergedInEval(nn.Linear):
    """Adds to its weight in eval mode, as loralib does."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight.add_(0.0 if mode else 1.0)
        return super().train(mode)


@pytest.mark.parametrize("name", ("xt-rotary", "hf-llama"))
def test_neither_train_nor_eval_of_the_model_is_called(name):
    model = ZOO[name](0)
    head = model.lm_head if name == "hf-llama" else model.to_logits
    layer = MergedInEval(head.in_features, head.out_features, bias=False)
    setattr(model, "lm_head" if name == "hf-llama" else "to_logits", layer)
    next(model.children()).training = False  # flags that differ
    weight, modes = layer.weight.detach().clone(), list_modes(model)
    generate(model, draw_prompts((3,)), NEW_TOKENS, [END])
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=0)
    assert list_modes(model) == modes


def test_inside_its_context_the_policy_with_its_adapter_off_is_the_reference():
    prompts = draw_prompts((4, 5, 4))
    base = ZOO["hf-llama"](0)
    expected = generate(base, prompts, NEW_TOKENS, [END])
    policy = lora(base)
    dpo = DPO(policy)
    trains = [parameter.requires_grad for parameter in policy.parameters()]
    with torch.no_grad():
        for parameter, is_trained in zip(policy.parameters(), trains, strict=True):
            if is_trained:
                parameter.normal_(std=2.0)
    assert generate(policy, prompts, NEW_TOKENS, [END]) != expected
    assert isinstance(dpo.reference, AdapterDisabled)
    with dpo.reference.frozen():
        assert generate(policy, prompts, NEW_TOKENS, [END]) == expected
    assert [parameter.requires_grad for parameter in policy.parameters()] == trains
