"""TRL's ids of the same dialogues, by its own trainer; every difference stands in a table."""

from types import SimpleNamespace
from typing import Any

import pytest

from dpo_wrapper.data import HuggingFaceTokenizer
from helpers.chat_templates import DIALOGUES, FAMILIES, dialogue, encode, show, template_tokenizer

pytestmark = pytest.mark.slow

trl = pytest.importorskip("trl")
pytest.importorskip("jinja2")


class Rows(list):
    """Rows with as much of a data set of `datasets` as TRL's trainer asks for."""

    def map(self, function: Any, fn_kwargs: dict | None = None, **_: Any) -> "Rows":
        return Rows({**row, **function(dict(row), **(fn_kwargs or {}))} for row in self)


def tokenize_by_trl(template: str, name: str) -> dict[str, Any]:
    """Prompt, chosen and rejected as `DPOTrainer` tokenizes them."""
    prompt, answer, tools = dialogue(template, name)
    row = {"prompt": prompt, "chosen": answer, "rejected": answer, "tools": tools or None}
    tokenizer = template_tokenizer(template)
    config = SimpleNamespace(dataset_num_proc=None, max_length=None)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return trl.DPOTrainer._prepare_dataset(trainer, Rows([row]), tokenizer, config, "train")[0]


AFTER = {
    # Behind the end of a turn these templates write more, which the model is not asked for: it has stopped.
    # TRL trains on it; our completions end with their turn.
    **dict.fromkeys(
        ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_8"), "\n"
    ),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "lfm2", "lfm2_v2"), "\n"),
    **dict.fromkeys(("gemma", "gemma3", "gemma4", "gemma4_v5"), "\n"),
    **dict.fromkeys(("phi3", "phi3_5"), "<|endoftext|>"),
}

WITHOUT_END = "glm4moe"
"""Nothing ends the last turn of its template: TRL's model never learns to stop; ours learns its EOS."""

DROPPED = {  # TRL trains on answers from which the template has dropped a part; we refuse the row
    "think": {
        "deepseekv3": "\n\n2<｜end▁of▁sentence｜>",
        "deepseek_r1_distill": "\n\n2<｜end▁of▁sentence｜>",
    },
    "reason": {
        **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), "2<|eot_id|>"),
        **dict.fromkeys(("qwen2_5", "qwen3_instruct_2507", "lfm2", "lfm2_v2"), "2<|im_end|>\n"),
        **dict.fromkeys(("gemma", "gemma3"), "2<end_of_turn>\n"),
        "gemma4": "2<turn|>\n",
        **dict.fromkeys(("phi3", "phi3_5"), "2<|end|><|endoftext|>"),
        **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), "2<｜end▁of▁sentence｜>"),
        "cohere": "2<|END_OF_TURN_TOKEN|>",
        "cohere2": "2<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    },
    "call": {  # a call is trained as an empty answer
        "llama3": "<|eot_id|>",
        "gemma": "<end_of_turn>\n",
        "gemma3": "<end_of_turn>\n",
        "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    },
}

RAISES = {  # TRL ends with an error, and so do we, with a sentence
    "system": {"gemma"},  # takes no system turn
    "call": {
        "phi3",
        "phi3_5",
        "deepseek_r1_distill",
        "cohere",
        "lfm2",
    },  # 'dict object' has no attribute 'content'
}
TRL_RAISES = {"call": {"deepseekv3"}}  # its template wants a content beside calls; we give it an empty one

THOUGHTS = "<think>\n\n</think>\n\n<think>\nOne and one.\n</think>\n\n2<|im_end|>\n"
"""Qwen 3.8's template does not know thoughts in the content: TRL trains an empty one before them."""

NAMES = ("plain", "system", "think", "reason", "call")


def test_the_tables_name_real_templates() -> None:
    named = {
        *AFTER,
        WITHOUT_END,
        *(t for table in (DROPPED, RAISES, TRL_RAISES) for row in table.values() for t in row),
    }
    assert named <= FAMILIES.keys() and {*DROPPED, *RAISES, *TRL_RAISES} <= DIALOGUES.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("template", FAMILIES)
def test_ids_against_trl(template: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = HuggingFaceTokenizer(template_tokenizer(template))
    prompt, answer, tools = dialogue(template, name)
    if name == "call" and not template.startswith("deepseek"):  # TRL hands arguments over as they are
        monkeypatch.setitem(answer[0]["tool_calls"][0]["function"], "arguments", {"port": "Brest"})
    if template in RAISES.get(name, ()):
        with pytest.raises(Exception):  # noqa: B017  a template may raise anything
            tokenize_by_trl(template, name)
        with pytest.raises(ValueError, match="the chat template should"):
            encode(tokenizer, prompt, answer, tools=tools)
        return
    if template in TRL_RAISES.get(name, ()):
        with pytest.raises(Exception):  # noqa: B017
            tokenize_by_trl(template, name)
        assert encode(tokenizer, prompt, answer, tools=tools).completions
        return
    row = tokenize_by_trl(template, name)
    assert row["chosen_ids"] == row["rejected_ids"]
    if template in DROPPED.get(name, ()):
        assert tokenizer.decode(row["chosen_ids"], skip_special_tokens=False) == DROPPED[name][template]
        with pytest.raises(ValueError, match="but it leaves out"):
            encode(tokenizer, prompt, answer, tools=tools)
        return
    encoded = encode(tokenizer, prompt, answer, tools=tools)
    if (template, name) == ("qwen3_8", "think"):
        whole = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"], skip_special_tokens=False)
        assert whole.endswith(THOUGHTS) and show(tokenizer, encoded).endswith(
            "<think>\n⟦" + THOUGHTS[27:-1] + "⟧"
        )
        return
    assert encoded.prompt == row["prompt_ids"]
    ours, theirs = encoded.completions[0], row["chosen_ids"]
    if template == WITHOUT_END:
        assert ours == [*theirs, tokenizer.eos_id]
        return
    assert theirs[: len(ours)] == ours
    after = "" if "gemma4" in template and name == "call" else AFTER.get(template, "")
    assert tokenizer.decode(theirs[len(ours) :], skip_special_tokens=False) == after


def test_arguments_of_a_call_as_text() -> None:
    """OpenAI's form writes the arguments as JSON text: TRL trains them quoted, as no model writes them."""
    tokenizer = HuggingFaceTokenizer(template_tokenizer("qwen2_5"))
    theirs = tokenizer.decode(tokenize_by_trl("qwen2_5", "call")["chosen_ids"])
    ours = tokenizer.decode(
        encode(tokenizer, *DIALOGUES["call"][:2], tools=DIALOGUES["call"][2]).completions[0]
    )
    assert '"arguments": "{\\"port\\": \\"Brest\\"}"' in theirs
    assert '"arguments": {"port": "Brest"}' in ours


def test_control_tokens_in_a_content() -> None:
    """TRL reads a user's <|im_end|> as the end of his turn; it stays text here."""
    prompt, answer = DIALOGUES["plain"][:2]
    own = template_tokenizer("qwen3")
    asked = [{"role": "user", "content": "<|im_end|>"}]
    theirs = own.apply_chat_template(asked + answer, return_dict=False)
    encoded = encode(HuggingFaceTokenizer(own), asked, answer)
    counts = [ids.count(own.eos_token_id) for ids in (theirs, encoded.prompt + encoded.completions[0])]
    assert counts == [3, 2] and prompt != asked
