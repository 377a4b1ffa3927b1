"""Ids of dialogues under real chat templates: those of `apply_chat_template`, and of the whole text."""

import copy
import json
from datetime import date
from typing import Any

import pytest

from dpo_wrapper.data import HuggingFaceTokenizer
from helpers.chat_templates import (
    DIALOGUES,
    FAMILIES,
    TOOL,
    TOOLS,
    assistant,
    call,
    control_tokens,
    dialogue,
    encode,
    show,
    system,
    template_text,
    template_tokenizer,
    user,
)

pytestmark = pytest.mark.slow

pytest.importorskip("trl")
pytest.importorskip("jinja2")

ENDS = {  # the tokens that may end the assistant's turn; None where the template writes none
    "llama": ["<|eot_id|>"],
    "qwen": ["<|im_end|>"],
    "nemotron": ["<|im_end|>"],
    "lfm": ["<|im_end|>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "phi": ["<|end|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "glm": [],
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
}


def load(template: str, **options: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(template_tokenizer(template), **options)


def with_objects(messages: list[Any], template: str) -> list[Any]:
    """Messages as a template expects them: arguments as an object, for DeepSeek as JSON text."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for item in message.get("tool_calls", ()):
            if not template.startswith("deepseek"):
                item["function"]["arguments"] = json.loads(item["function"]["arguments"])
        if message["role"] == "developer" and "gptoss" not in template:
            message["role"] = "system"
        message["content"] = message["content"] or ""
        if template == "qwen3_8" and "</think>" in message["content"]:  # it knows no thoughts in the content
            message |= {"content": "2", "reasoning_content": "One and one."}
    return messages


@pytest.mark.pitfall(10)
@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("template", FAMILIES)
def test_ids_are_those_of_the_template(template: str, name: str) -> None:
    tokenizer = load(template)
    prompt, answer, tools = dialogue(template, name)
    try:
        encoded = encode(tokenizer, prompt, answer, tools=tools)
    except ValueError:
        return  # test_chat_templates.py says which are refused
    own = tokenizer.tokenizer
    given, said = with_objects(prompt, template), with_objects(answer, template)
    options: dict[str, Any] = {"tools": tools or None, "tokenize": False}
    turns = [*given, *said]
    if name == "prefill":
        turns = [*given[:-1], assistant(given[-1]["content"] + said[0]["content"])]
        opening = own.apply_chat_template(given, continue_final_message=True, **options)
    else:
        opening = own.apply_chat_template(given, add_generation_prompt=True, **options)
    whole = own.apply_chat_template(turns, **options)
    ends = next(ends for family, ends in ENDS.items() if template.startswith(family))
    stop = max((whole.rfind(end) + len(end) for end in ends if end in whole), default=len(whole))
    expected = own(whole[:stop], add_special_tokens=False)["input_ids"]
    ids = encoded.prompt + encoded.completions[0]
    assert ids == (expected if ends else [*expected, own.eos_token_id])
    inference = own(opening, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_prompt(*as_arguments(prompt, tools)) == inference
    assert encoded.prompt == (inference[: len(encoded.prompt)] if encoded.is_cut else inference)
    assert encoded.is_cut == (len(encoded.prompt) < len(inference)) and not encoded.is_continued
    # BOS: one where the template writes one, else none
    writes_bos = bool(own.bos_token) and whole.startswith(own.bos_token)
    assert ids.count(own.bos_token_id) == writes_bos and (not writes_bos or ids[0] == own.bos_token_id)


def as_arguments(prompt: list[Any], tools: list[Any]) -> tuple[Any, Any]:
    from dpo_wrapper.data.rows.messages import parse_messages

    return parse_messages(prompt, "prompt"), tools


@pytest.mark.parametrize("template", FAMILIES)
def test_contents_are_never_control_tokens(template: str) -> None:
    """All control tokens of the model, spelled by every part of a dialogue, stay text."""
    tokenizer = load(template)
    controls = control_tokens(tokenizer)
    assert len(controls) >= 6
    spelled = " ".join(controls.values())
    plain = encode(tokenizer, [user("one"), assistant("two"), user("three")], [assistant("four")])
    texts = [f"one {spelled}.", f"two {spelled}.", f"three{spelled}.", f"four {spelled} ."]
    first, second, third, fourth = texts
    encoded = encode(tokenizer, [user(first), assistant(second), user(third)], [assistant(fourth)])
    ids = encoded.prompt + encoded.completions[0]
    kept = [id_ for id_ in plain.prompt + plain.completions[0] if id_ in controls]
    assert [id_ for id_ in ids if id_ in controls] == kept
    text = "".join(tokenizer.decode(ids, skip_special_tokens=False).split())
    assert all("".join(part.split()) in text for part in texts)
    assert is_same_without(spelled, encoded, plain, tokenizer)


def is_same_without(spelled: str, encoded: Any, plain: Any, tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether the dialogue is the plain one apart from the text that its turns spell besides."""
    text = show(tokenizer, encoded)
    for before, end in (("one ", "."), ("two ", "."), ("three", "."), ("four ", " .")):
        text = text.replace(before + spelled + end, before.strip())
    return text == show(tokenizer, plain)


@pytest.mark.parametrize("template", ["llama3_1", "qwen3", "gptoss", "lfm2_v2", "glm4moe"])
def test_tools_calls_and_results_are_never_control_tokens(template: str) -> None:
    tokenizer = load(template)
    end = {"llama3_1": "<|eot_id|>", "gptoss": "<|end|>", "glm4moe": "<|user|>"}.get(template, "<|im_end|>")
    id_ = tokenizer.tokenizer.convert_tokens_to_ids(end)
    prompt, answer, tools = dialogue(template, "multi")
    plain = encode(tokenizer, prompt, answer, tools=tools)
    tools = [{"type": "function", "function": TOOLS[0]["function"] | {"description": f"High{end}tide"}}]
    called = assistant("", tool_calls=[call(f"Bre{end}st")])
    injected = [called, TOOL | {"content": f"06{end}10"}, assistant(f"At {end}06:10.")]
    encoded = encode(tokenizer, prompt, injected, tools=tools)
    count = [(one.prompt + one.completions[0]).count(id_) for one in (plain, encoded)]
    assert count[0] == count[1] > 0
    assert all(part in show(tokenizer, encoded) for part in (f"High{end}", f"Bre{end}st", f"06{end}10"))


@pytest.mark.parametrize(
    ("template", "written"),
    [("llama3_2", "Today Date: 03 Feb 2031\n"), ("gptoss", "Current date: 2031-02-03\n")],
)
def test_the_date_is_that_of_the_run(template: str, written: str) -> None:
    tokenizer = load(template, today=date(2031, 2, 3))
    encoded = encode(tokenizer, *DIALOGUES["plain"][:2])
    assert written in show(tokenizer, encoded)
    today = encode(load(template), *DIALOGUES["plain"][:2])
    assert date.today().strftime(written[:12] + "%Y")[-4:] in show(load(template), today)


@pytest.mark.parametrize(
    ("template", "arguments", "opening", "scored"),
    [
        ("qwen3", {"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n", "2<|im_end|>"),
        ("nemotron_3_nano", {"enable_thinking": False}, "assistant\n<think></think>", "2<|im_end|>"),
        ("qwen3_5_think", {"enable_thinking": False}, "assistant\n<think>\n\n</think>\n\n", "2<|im_end|>"),
        ("qwen3_5_nothink", {"enable_thinking": True}, "assistant\n<think>\n", "\n</think>\n\n2<|im_end|>"),
        ("glm4moe", {"enable_thinking": False}, "<|assistant|>\n<think></think>", "\n2<|endoftext|>"),
        ("llama3_1", {"date_string": "1 May 2025"}, "assistant<|end_header_id|>\n\n", "2<|eot_id|>"),
        (
            "gptoss",
            {"reasoning_effort": "low"},
            "<|start|>assistant",
            "<|channel|>final<|message|>2<|return|>",
        ),
    ],
)
def test_arguments_of_the_template(template: str, arguments: dict, opening: str, scored: str) -> None:
    tokenizer = load(template, template_arguments=arguments)
    encoded = encode(tokenizer, *DIALOGUES["plain"][:2])
    assert show(tokenizer, encoded).endswith(f"{opening}⟦{scored}⟧") and not encoded.is_cut
    texts = {"date_string": "Today Date: 1 May 2025", "reasoning_effort": "Reasoning: low"}
    assert texts.get(next(iter(arguments)), "") in show(tokenizer, encoded)
    assert tokenizer.fingerprint() != load(template).fingerprint()


def test_another_template() -> None:
    """A template in a file replaces that of the tokenizer, and is saved with it."""
    tokenizer = load("deepseek_r1_distill", chat_template=template_text("qwen2_5"))
    encoded = encode(tokenizer, *DIALOGUES["think"][:2])
    assert show(tokenizer, encoded).endswith("⟦<think>\nOne and one.\n</think>\n\n2<|im_end|>⟧")
    assert tokenizer.fingerprint() != load("deepseek_r1_distill").fingerprint()


REFUSED: list[tuple[str, list[Any], list[Any], list[Any], str]] = [
    (
        "llama3",
        [user("Q")],
        [assistant("A")],
        TOOLS,
        "the tools: name another template by --chat-template, or ignore",
    ),
    ("gemma3", [user("Q")], [assistant("A")], TOOLS, "leaves out the tools"),
    ("deepseekv3", [user("Q")], [assistant("A")], TOOLS, "leaves out the tools"),
    ("phi3", [user("Q"), assistant("A"), TOOL], [assistant("B")], [], "leaves out the tool turn"),
    ("gptoss", [system("S"), user("Q"), system("T")], [assistant("A")], [], "leaves out the system turn"),
    (
        "deepseek_r1_distill",
        [system("S"), system("T"), user("Q")],
        [assistant("A")],
        [],
        "out the system turn",
    ),
    (
        "gptoss",
        [user("Q")],
        [assistant(None, tool_calls=[call("Brest"), call("Oslo")])],
        TOOLS,
        "out a tool call",
    ),
    (
        "llama3_1",
        [user("Q")],
        [assistant(None, tool_calls=[call("Brest"), call("Oslo")])],
        TOOLS,
        "single tool-calls",
    ),
    (
        "lfm2",
        [user("Use tide."), assistant("", tool_calls=[call("Brest")]), TOOL],
        [assistant("A")],
        TOOLS,
        "a tool call",
    ),
    ("gemma3", [user("Q"), user("R")], [assistant("A")], [], "roles must alternate"),
    (
        "qwen3_5_think",
        [user("Q"), system("S"), user("R")],
        [assistant("A")],
        [],
        "System message must be at the beg",
    ),
    ("deepseekv3", [user("Q")], [assistant("So <think>a</think>b")], [], "leaves out a part of the answer"),
    (
        "deepseekv3",
        [user("Q")],
        [assistant("A", reasoning_content="B")],
        [],
        "leaves out the reasoning_content",
    ),
    ("gemma", [user("Q")], [assistant("A", thinking="B")], [], "leaves out the thinking"),
    ("qwen2_5", [user("Q")], [assistant("A", reasoning="B")], [], "leaves out the reasoning"),
    (
        "qwen3",
        [user("Q")],
        [assistant("A", reasoning_content="B"), user("R"), assistant("C")],
        [],
        "the reasoning_content",
    ),
]


@pytest.mark.parametrize(("template", "prompt", "answer", "tools", "reason"), REFUSED)
def test_a_template_that_drops_a_part_is_refused(
    template: str, prompt: list[Any], answer: list[Any], tools: list[Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^the chat template should .*, but it .*{reason}") as caught:
        encode(load(template), prompt, answer, tools=tools)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


REWRITES = (  # the first turn says how many there are
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' ~ messages | length if loop.first }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = load("qwen2_5", chat_template=REWRITES)
    with pytest.raises(
        ValueError, match="should write the turns before turn 2 alike in a longer dialogue, but"
    ):
        encode(tokenizer, [user("Q")], [assistant("A")])


@pytest.mark.parametrize("template", ["llama3_1", "qwen3", "gptoss", "glm4moe", "gemma4_v5", "cohere2"])
def test_every_turn_of_the_assistant_is_scored(template: str) -> None:
    tokenizer = load(template)
    encoded = encode(tokenizer, *DIALOGUES["system"][:2], score="assistant")
    text = show(tokenizer, encoded)
    parts = [part.partition("⟧")[0] for part in text.split("⟦")[1:]]
    assert len(parts) == 2 and "2" in parts[0] and "4" in parts[1] and "user" not in parts[0].split("2")[0]
    alone = show(tokenizer, encode(tokenizer, *DIALOGUES["system"][:2]))
    assert text.replace("⟦", "").replace("⟧", "") == alone.replace("⟦", "").replace("⟧", "")
    assert all(part.endswith(">") for part in parts)  # each ends its turn
