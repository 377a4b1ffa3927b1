"""Prompts that are sampled from, and how samples are shown."""

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.evaluation.samples import (
    MAX_OPENING_TOKENS,
    find_prompts,
    format_sample,
    format_samples,
    shorten,
)


def test_prompts_differ_and_have_a_completion_to_imitate():
    undesirable = TokenizedExample((1, 2), ((3,),), label=False)
    examples = [undesirable, *[TokenizedExample((1, k), ((k, 9), (8,))) for k in (4, 4, 5, 6)]]
    assert [prompt.ids for prompt in find_prompts([examples], 2)] == [[1, 4], [1, 5]]
    assert [prompt.completion for prompt in find_prompts([[], [undesirable], examples], 1)] == [[4, 9]]
    assert find_prompts([[undesirable], []], 3) == []


def test_a_text_without_a_prompt_is_continued():
    (prompt,) = find_prompts([[TokenizedExample((1,), (tuple(range(2, 100)),))]], 1)
    assert prompt.ids == list(range(1, MAX_OPENING_TOKENS + 1)) and prompt.completion[0] == prompt.ids[-1] + 1


def test_texts_are_short_and_leave_the_terminal_alone():
    assert shorten("a\n b\x1b[2J\tc") == "a b\ufffd[2J c"
    texts = {"prompt": "x" * 20, "reference": None, "policy": "y" * 20, "chosen": ""}
    assert format_sample(texts, 10).splitlines() == [
        f"prompt     …{'x' * 10}",
        f"policy     {'y' * 10}…",
        "chosen     (empty)",
    ]


def test_what_was_said_is_shown_of_a_prompt():
    record = {"prompt": "<user>cat?<assistant>", "readable_prompt": "cat?", "reference": None}
    lines = format_samples([record | {"policy": "dog", "chosen": "cat"}]).splitlines()
    assert lines == ["prompt     cat?", "policy     dog", "chosen     cat"]
