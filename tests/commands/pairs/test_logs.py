"""Prompts of logs as the model's tokens, and what becomes of those that are too long or cannot be used."""

import pytest

from dpo_wrapper.commands.pairs.logs import encode_logs
from dpo_wrapper.data import ByteTokenizer
from dpo_wrapper.data.errors import ExampleError
from dpo_wrapper.data.examples import Example
from dpo_wrapper.data.rows.messages import Message
from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from helpers.tokenizers import CHATML, save_tokenizer

BYTES = ByteTokenizer()
LONG = Example("0123456789", ("a",), source="logs.jsonl, line 1")


def test_a_prompt_that_is_too_long_is_cut_left_out_or_refused():
    logs = encode_logs([LONG, Example("12", ("b",))], BYTES, 5)
    assert logs.answers[0].prompt_ids == (BYTES.bos_id, *b"6789")  # BOS stays in front
    assert logs.answers[0].example is LONG and len(logs.answers) == 2 and logs.counts == {"cut": 1}
    logs = encode_logs([LONG, Example("12", ("b",))], BYTES, 5, on_long="drop")
    assert [answer.example.prompt for answer in logs.answers] == ["12"] and logs.counts == {"dropped": 1}
    with pytest.raises(ExampleError, match=r"^logs.jsonl, line 1: a prompt should have at most 5 tokens"):
        encode_logs([LONG], BYTES, 5, on_long="error")


def test_a_plain_prompt_is_the_users_turn_where_there_is_a_template(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, bos=None, eos="<|im_end|>", template=CHATML))
    example, turn = Example("Hi", ("a",)), (Message("user", "Hi"),)
    [answer] = encode_logs([example], tokenizer, 99).answers
    assert list(answer.prompt_ids) == tokenizer.encode_prompt(turn) and answer.example is example
    assert answer.clean_answer(" a\n") == "a"
    [answer] = encode_logs([example], tokenizer, 99, as_chat=False).answers
    assert list(answer.prompt_ids) == tokenizer.encode_prompt("Hi")
    assert answer.clean_answer(" a\n") == " a\n"


def test_of_several_turns_the_last_is_the_answer():
    ask, answer, again = Message("user", "a"), Message("assistant", "b"), Message("user", "c")
    example = Example((ask,), ((answer, again, Message("assistant", "d")),))
    [logged] = encode_logs([example], BYTES, 99).answers
    assert (logged.example.prompt, logged.example.completions) == ((ask, answer, again), ("d",))


def test_rows_without_a_prompt_or_an_answer_are_refused_or_left_out():
    bad = [Example("", ("a text",)), Example("p", (" ",))]
    for example, problem in zip(bad, ("a text without a prompt", "should have text, but"), strict=True):
        with pytest.raises(ExampleError, match=problem):
            encode_logs([example], BYTES, 99)
    logs = encode_logs([*bad, Example("p", ("a",))], BYTES, 99, on_error="skip")
    assert len(logs.answers) == 1 and len(logs.errors) == 2
    assert len(encode_logs(bad[1:], BYTES, 99, needs_answer=False).answers) == 1
