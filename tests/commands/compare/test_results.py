"""What results have in common."""

import pytest

from dpo_wrapper.commands.compare.results import RunResult, keep_shared_prompts


def make_result(scored, answered):
    scores, answers = ([{"prompt": one, "number": k} for k, one in enumerate(x)] for x in (scored, answered))
    return RunResult(None, [], scores, answers, [])


def test_prompts_that_a_run_has_left_out_are_left_out_of_all():
    """Two pairs of one prompt stay beside each other; answers are to the first prompts of each run."""
    one, two = make_result("aabcd", "abc"), make_result("aabd", "abd")
    for result in keep_shared_prompts([one, two]):
        assert [line["prompt"] for line in result.scores] == list("aabd")
        assert [line["prompt"] for line in result.answers] == list("ab")
    assert [line["number"] for line in keep_shared_prompts([one, two])[0].scores] == [0, 1, 2, 4]
    assert keep_shared_prompts([one, one]) == [one, one]


def test_results_without_a_common_prompt_are_refused():
    with pytest.raises(ValueError, match="the contestants should have eval prompts in common"):
        keep_shared_prompts([make_result("ab", ""), make_result("cd", "")])
