"""Which prompts are asked, and which answers are exact."""

import pytest
import torch
from torch import nn

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.evaluation.exact_answers import MAX_ANSWER_TOKENS, ExactAnswers
from helpers.models import VOCAB, ZOO

END, OTHER_END = 0, 1


def pair(prompt, chosen):
    return TokenizedExample(tuple(prompt), (tuple(chosen), (9, END)))


def asked(examples, max_prompts=100):
    return ExactAnswers(examples, max_prompts, (END, OTHER_END)).examples


def test_prompts_are_asked_once_and_so_many():
    examples = [pair([8, k // 2], [k + 3, END]) for k in range(8)]
    assert asked(examples) == examples[::2]
    assert asked(examples, 2) == [examples[0], examples[2]]
    assert asked(examples, 0) == asked([]) == []


def test_only_desirable_answers_to_a_prompt_are_asked_for():
    desirable, undesirable = (TokenizedExample((8, 7 + k), ((5, END),), bool(k)) for k in (1, 0))
    document = TokenizedExample((8,), ((5, END),))  # its prompt is a BOS alone
    assert asked([undesirable, desirable, document]) == [desirable]


def test_long_answers_are_left_out_and_many_of_them_leave_out_all():
    short = [pair([8, k], [3] * (MAX_ANSWER_TOKENS - 1) + [END]) for k in range(19)]
    long = pair([8, 50], [3] * MAX_ANSWER_TOKENS + [END])
    unended = pair([8, 51], [3, 4])
    assert asked([long, *short]) == asked([*short, unended]) == short
    assert asked([long, *short[:9]]) == []
    assert asked([pair([8, 1], [3] * 40 + [END])]) == []


class SecondPromptToken(nn.Module):
    """Stands for a model that answers with the second token of its prompt, and knows when to end or not."""

    def __init__(self, end):
        super().__init__()
        self.end = end


@pytest.fixture
def generated(monkeypatch):
    def generate(model, prompts, max_new_tokens, end_ids, max_positions, progress):
        return [[prompt[1], *model.end][:max_new_tokens] for prompt in prompts]

    monkeypatch.setattr("dpo_wrapper.evaluation.exact_answers.generate", generate)


def test_an_exact_answer_has_the_same_tokens_and_ends(generated):
    examples = [pair([8, 2], [2, END]), pair([8, 3], [3, END]), pair([8, 4], [7, 6, END])]
    examples.append(pair([8, 5], [5, OTHER_END, 7]))  # what stands after the end is no part of the answer
    answers = ExactAnswers(examples, 100, (END, OTHER_END))
    assert answers.measure_rate(SecondPromptToken([])) == 0
    assert answers.measure_rate(SecondPromptToken([OTHER_END])) == 0.25
    assert answers.measure_rate(SecondPromptToken([END])) == 0.5


def test_the_answers_of_a_model_are_its_greedy_ones():
    model, ends = ZOO["xt-rotary"](0).eval(), range(VOCAB // 2)  # so many that answers end soon
    examples = []
    for first in range(2, 12):
        ids = [8, first]
        while len(ids) < 3 or ids[-1] not in ends:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        answer = ids[2:] if first % 3 else [*ids[2:-1], (ids[-1] + 1) % len(ends)]
        examples.append(TokenizedExample((8, first), (tuple(answer),)))
    done = []
    rate = ExactAnswers(examples, 100, ends).measure_rate(model, done.append)
    assert rate == 0.7 and sum(done) == 10
