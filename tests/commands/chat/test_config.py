"""Options of chat that cannot be, or contradict each other."""

import pytest

from dpo_wrapper.commands.chat.config import ChatConfig


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"prompt": " \n"}, "^--prompt should hold a text, but it is empty: leave it out to talk"),
        ({"max_new_tokens": 0}, "^--max-new-tokens should be at least 1, but it is 0"),
        ({"temperature": -1.0}, "^--temperature should be a number above 0, but it is -1.0: give another"),
        ({"temperature": 1.0, "top_p": 0.0}, "^--top-p should be above 0 and at most 1, but it is 0.0"),
        ({"top_p": 0.9}, "^--top-p should be given with a --temperature above 0, but that is 0: give one"),
        ({"seed": 1}, "^--seed should be given with a --temperature above 0, but that is 0: give one"),
        ({"system": "Be brief.", "as_chat": "never"}, "^--system should stand in a dialogue, but --as-chat"),
    ],
)
def test_options_that_cannot_be_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        ChatConfig(model="m", **options)


def test_answers_are_sampled_where_there_is_a_temperature():
    assert ChatConfig(model="m").sampling is None
    sampling = ChatConfig(model="m", temperature=0.7, top_p=0.9, seed=3).sampling
    assert sampling is not None
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.7, 0.9, 3)
