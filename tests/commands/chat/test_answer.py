"""Answers piece by piece: all of them together are what `generate` gives."""

import pytest
import torch

import dpo_wrapper.evaluation.generate as module
from dpo_wrapper.commands.chat.answer import TextStream, stream_answer
from dpo_wrapper.data import ByteTokenizer
from dpo_wrapper.evaluation.generate import generate, list_end_ids
from dpo_wrapper.evaluation.sampling import Sampling
from dpo_wrapper.pretrained import load_pretrained

BYTES = ByteTokenizer()
PROMPT = [256, *b"Once upon a time"]


@pytest.mark.parametrize("folder", ["llama", "decoder"])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.9, top_p=0.8)])
def test_an_answer_is_that_of_generate(folder, sampling, request):
    model = load_pretrained(str(request.getfixturevalue(folder)), None, 128).model
    options = {"sampling": sampling, "seeds": [5]}
    [expected] = generate(model, [PROMPT], 12, list_end_ids(BYTES), **options)
    pieces: list[str] = []
    answer = stream_answer(model, PROMPT, BYTES, 12, pieces.append, sampling=sampling, seed=5)
    assert answer == (BYTES.decode(expected), False)
    assert "".join(pieces) == answer[0] and len(pieces) > 1


@pytest.mark.parametrize("folder", ["llama", "decoder"])
def test_an_answer_ends_with_a_turn_also_behind_an_earlier_one(folder, request, monkeypatch):
    """x-transformers would go on where the prompt holds an end."""
    model = load_pretrained(str(request.getfixturevalue(folder)), None, 128).model
    script = iter([*b"yy", BYTES.eos_id])  # a fourth token would be one too many
    monkeypatch.setattr(module, "_choose_largest", lambda logits: torch.tensor([next(script)]))
    prompt = [BYTES.bos_id, *b"a", BYTES.eos_id, *b"b"]
    assert stream_answer(model, prompt, BYTES, 9, lambda piece: None) == ("yy", False)


def test_ctrl_c_stops_an_answer_and_leaves_what_there_is(llama):
    model = load_pretrained(str(llama), None, 128).model
    pieces: list[str] = []

    def show(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    text, is_stopped = stream_answer(model, PROMPT, BYTES, 50, show)
    assert is_stopped and text == "".join(pieces)
    assert torch.equal(*(model(torch.tensor([PROMPT])).logits for _ in range(2)))  # it is as it was


def test_a_character_of_several_tokens_is_in_one_piece():
    pieces: list[str] = []
    stream = TextStream(BYTES, pieces.append)
    for id_ in "a🙂é".encode() + b"\xf0\x9f":
        stream.put(id_)
    assert pieces == ["a", "🙂", "é"]
    stream.end()
    assert pieces == ["a", "🙂", "é", "\ufffd"] and stream.text == "a🙂é\ufffd"
