"""What a model is given to answer to."""

import pytest

from dpo_wrapper.commands.chat.conversation import Conversation
from dpo_wrapper.data import ByteTokenizer, load_tokenizer
from helpers.tokenizers import CHATML, save_tokenizer

BYTES = ByteTokenizer()
BOS, SYSTEM, USER, ASSISTANT = (BYTES.bos_id, *(BYTES.role_ids[r] for r in ("system", "user", "assistant")))


def test_a_dialogue_is_remembered_until_it_is_reset():
    talk = Conversation(BYTES, is_dialogue=True, system="s")
    assert talk.encode("a") == [BOS, SYSTEM, *b"s", USER, *b"a", ASSISTANT]
    talk.add("a", "b")
    assert talk.encode("c") == [
        BOS, SYSTEM, *b"s", USER, *b"a", ASSISTANT, *b"b", USER, *b"c", ASSISTANT
    ]  # fmt: skip
    talk.reset()
    assert talk.encode("c") == [BOS, SYSTEM, *b"s", USER, *b"c", ASSISTANT] and talk.num_answers == 0


def test_a_prompt_is_by_itself_where_there_is_no_dialogue():
    talk = Conversation(BYTES, is_dialogue=False)
    talk.add("a", "b")
    assert talk.encode("c") == [BOS, *b"c"] and talk.num_answers == 1


def test_a_chat_template_writes_the_dialogue(tmp_path):
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, eos="<|im_end|>", template=CHATML))
    talk = Conversation(tokenizer, is_dialogue=True)
    talk.add("Hello", "I am")
    text = tokenizer.decode(talk.encode("Who?"), skip_special_tokens=False)
    assert text == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nI am<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_without_a_token_is_refused(tmp_path):
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, bos=None, puts_bos=False))
    with pytest.raises(ValueError, match="should have at least one token, but it has none"):
        Conversation(tokenizer, is_dialogue=False).encode("")
