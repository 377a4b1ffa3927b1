"""Chat templates of real models, as TRL ships them: what the model reads, and what it learns to write."""

from typing import Any

import pytest

from dpo_wrapper.data import HuggingFaceTokenizer
from helpers.chat_templates import (
    DIALOGUES,
    FAMILIES,
    assistant,
    dialogue,
    encode,
    show,
    template_tokenizer,
    user,
)

pytest.importorskip("trl")
pytest.importorskip("jinja2")

QWEN_OPENS = "<|im_end|>\n<|im_start|>assistant\n"
LLAMA_OPENS = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
COHERE_OPENS = "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
OPENINGS: dict[str, str] = {  # what stands between the question and the answer, the same for all dialogues
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), LLAMA_OPENS),
    **dict.fromkeys(
        ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_8"), QWEN_OPENS
    ),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "lfm2", "lfm2_v2"), QWEN_OPENS),
    **dict.fromkeys(("gemma", "gemma3"), "<end_of_turn>\n<start_of_turn>model\n"),
    **dict.fromkeys(("gemma4", "gemma4_v5"), "<turn|>\n<|turn>model\n"),
    **dict.fromkeys(("phi3", "phi3_5"), "<|end|><|assistant|>"),  # its tokens have taken the line breaks
    "gptoss": "<|end|><|start|>assistant",
    **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), "<｜Assistant｜>"),
    "glm4moe": "<|assistant|>",
    "cohere": COHERE_OPENS,
    "cohere2": f"{COHERE_OPENS}<|START_RESPONSE|>",
}
THOUGHT = "<think>\nOne and one.\n</think>\n\n2"
JSON_CALL = '<tool_call>\n{"name": "tide", "arguments": {"port": "Brest"}}\n</tool_call><|im_end|>'
XML_CALL = "<tool_call>\n<function=tide>\n<parameter=port>\nBrest\n</parameter>\n</function>\n</tool_call>"
QWEN_RESULT = "⟧\n<|im_start|>user\n<tool_response>\n06:10\n</tool_response>" + QWEN_OPENS
LLAMA_CALL = '⟦{"name": "tide", "parameters": {"port": "Brest"}}<|eot_id|>'
LLAMA_RESULT = '⟧<|start_header_id|>ipython<|end_header_id|>\n\n"06:10"' + LLAMA_OPENS
GEMMA_CALL = '⟦<|tool_call>call:tide{port:<|"|>Brest<|"|>}<tool_call|><|tool_response>⟧'
GEMMA_RESULT = 'response:tide{value:<|"|>06:10<|"|>}<tool_response|>'
GPT_CALL = '⟦ to=functions.tide<|channel|>commentary json<|message|>{"port": "Brest"}<|call|>⟧'
GPT_RESULT = (
    '<|start|>functions.tide to=assistant<|channel|>commentary<|message|>"06:10"<|end|><|start|>assistant'
)
SEEK_CALL = (
    "⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tide\n```json\n"
    '{"port": "Brest"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧'
)
SEEK_RESULT = (
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>06:10<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)
GLM_CALL = (
    "⟦\n<think></think>\n<tool_call>tide\n<arg_key>port</arg_key>\n<arg_value>Brest</arg_value>\n</tool_call>"
)
GLM_RESULT = "<|observation|>⟧\n<tool_response>\n06:10\n</tool_response><|assistant|>"
LFM_CALL = "⟦<|tool_call_start|>[tide(port='Brest')]<|tool_call_end|><|im_end|>⟧"
LFM_RESULT = "\n<|im_start|>tool\n<|tool_response_start|>06:10<|tool_response_end|>" + QWEN_OPENS
NEMOTRON_CALL = f"<think>⟦</think>\n{XML_CALL}\n<|im_end|>"

REASONING, CALL = "the reasoning_content", "a tool call"
WRITTEN: dict[str, dict[str, str]] = {  # what follows the opening; without a bracket, why the row is refused
    "llama3": {
        "system": "⟦4<|eot_id|>⟧",
        "think": f"⟦{THOUGHT}<|eot_id|>⟧",
        "reason": REASONING,
        "call": CALL,
        "multi": CALL,
    },
    "llama3_1": {
        "system": "⟦4<|eot_id|>⟧",
        "think": f"⟦{THOUGHT}<|eot_id|>⟧",
        "reason": REASONING,
        "call": f"{LLAMA_CALL}⟧",
        "multi": f"{LLAMA_CALL}{LLAMA_RESULT}⟦At 06:10.<|eot_id|>⟧",
    },
    "qwen2_5": {
        "system": "⟦4<|im_end|>⟧",
        "think": f"⟦{THOUGHT}<|im_end|>⟧",
        "reason": REASONING,
        "call": f"⟦{JSON_CALL}⟧",
        "multi": f"⟦{JSON_CALL}{QWEN_RESULT}⟦At 06:10.<|im_end|>⟧",
    },
    "qwen3": {
        "system": "⟦<think>\n\n</think>\n\n4<|im_end|>⟧",
        "think": f"⟦{THOUGHT}<|im_end|>⟧",
        "reason": "⟦<think>\nTwice 1.\n</think>\n\n2<|im_end|>⟧",
        "call": f"⟦<think>\n\n</think>\n\n{JSON_CALL}⟧",
        "multi": f"⟦{JSON_CALL}{QWEN_RESULT}⟦<think>\n\n</think>\n\nAt 06:10.<|im_end|>⟧",
    },
    "qwen3_5_think": {
        "system": "<think>\n⟦\n</think>\n\n4<|im_end|>⟧",
        "think": "<think>\n⟦One and one.\n</think>\n\n2<|im_end|>⟧",
        "reason": "<think>\n⟦Twice 1.\n</think>\n\n2<|im_end|>⟧",
        "call": f"<think>\n⟦\n</think>\n\n{XML_CALL}<|im_end|>⟧",
        "multi": f"<think>\n⟦\n</think>\n\n{XML_CALL}<|im_end|>{QWEN_RESULT}"
        "<think>\n⟦\n</think>\n\nAt 06:10.<|im_end|>⟧",
    },
    "qwen3_5_nothink": {
        "system": "<think>\n\n</think>\n\n⟦4<|im_end|>⟧",
        "think": "<think>\n⟦One and one.\n</think>\n\n2<|im_end|>⟧",
        "reason": "<think>\n⟦Twice 1.\n</think>\n\n2<|im_end|>⟧",
        "call": f"<think>\n\n</think>\n\n⟦{XML_CALL}<|im_end|>⟧",
        "multi": f"<think>\n\n</think>\n\n⟦{XML_CALL}<|im_end|>{QWEN_RESULT}"
        "<think>\n\n</think>\n\n⟦At 06:10.<|im_end|>⟧",
    },
    "nemotron_3_nano": {
        "system": "<think>⟦</think>4<|im_end|>⟧",
        "think": "<think>\n⟦One and one.\n</think>\n\n2<|im_end|>⟧",
        "reason": "<think>\n⟦Twice 1.\n</think>\n2<|im_end|>⟧",
        "call": f"{NEMOTRON_CALL}⟧",
        "multi": NEMOTRON_CALL
        + QWEN_RESULT.replace("</tool_response>", "</tool_response>\n")
        + "<think>⟦</think>At 06:10.<|im_end|>⟧",
    },
    "gemma": {
        "system": "System role not supported",
        "think": f"⟦{THOUGHT}<end_of_turn>⟧",
        "reason": REASONING,
        "call": CALL,
        "multi": "Conversation roles must alternate",
    },
    "gemma4": {
        "system": "⟦4<turn|>⟧",
        "think": f"⟦{THOUGHT}<turn|>⟧",
        "reason": REASONING,
        "call": GEMMA_CALL,
        "multi": f"{GEMMA_CALL}{GEMMA_RESULT}⟦At 06:10.<turn|>⟧",
    },
    "phi3": {
        "system": "⟦4<|end|>⟧",
        "think": f"⟦{THOUGHT}<|end|>⟧",
        "reason": REASONING,
        "call": CALL,
        "multi": CALL,
    },
    "gptoss": {
        "system": "⟦<|channel|>final<|message|>4<|return|>⟧",
        "think": f"⟦<|channel|>final<|message|>{THOUGHT}<|return|>⟧",
        "reason": "⟦<|channel|>analysis<|message|>Twice 1.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>2<|return|>⟧",
        "call": GPT_CALL,
        "multi": f"{GPT_CALL}{GPT_RESULT}⟦<|channel|>final<|message|>At 06:10.<|return|>⟧",
    },
    "deepseekv3": {
        "system": "⟦4<｜end▁of▁sentence｜>⟧",
        "think": "a part of the answer",
        "reason": REASONING,
        "call": SEEK_CALL,
        "multi": f"{SEEK_CALL}{SEEK_RESULT}⟦At 06:10.<｜end▁of▁sentence｜>⟧",
    },
    "glm4moe": {
        "system": "⟦\n<think></think>\n4<|endoftext|>⟧",
        "think": "⟦\n<think>One and one.</think>\n2<|endoftext|>⟧",
        "reason": "⟦\n<think>Twice 1.</think>\n2<|endoftext|>⟧",
        "call": f"{GLM_CALL}<|endoftext|>⟧",
        "multi": f"{GLM_CALL}{GLM_RESULT}⟦\n<think></think>\nAt 06:10.<|endoftext|>⟧",
    },
    "cohere": {
        "system": "⟦4<|END_OF_TURN_TOKEN|>⟧",
        "think": f"⟦{THOUGHT}<|END_OF_TURN_TOKEN|>⟧",
        "reason": REASONING,
        "call": CALL,
        "multi": "Conversation roles must alternate",
    },
    "cohere2": {
        "system": "⟦4<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
        "think": f"⟦{THOUGHT}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟧",
        "reason": REASONING,
        "call": CALL,
        "multi": "Conversation roles must alternate",
    },
    "lfm2": {
        "system": "⟦4<|im_end|>⟧",
        "think": f"⟦{THOUGHT}<|im_end|>⟧",
        "reason": REASONING,
        "call": CALL,
        "multi": CALL,
    },
}
WRITTEN["llama3_2"] = WRITTEN["llama3_1"]
WRITTEN["qwen3_8"] = WRITTEN["qwen3_5_think"]  # it does not know thoughts in the content
WRITTEN["qwen3_instruct_2507"] = WRITTEN["qwen2_5"]
WRITTEN["nemotron_3_super"] = WRITTEN["nemotron_3_nano"]
WRITTEN["gemma3"] = WRITTEN["gemma"] | {"system": "⟦4<end_of_turn>⟧"}
WRITTEN["gemma4_v5"] = WRITTEN["gemma4"] | {"reason": "⟦<|channel>thought\nTwice 1.\n<channel|>2<turn|>⟧"}
WRITTEN["phi3_5"] = WRITTEN["phi3"]
WRITTEN["deepseek_r1_distill"] = WRITTEN["deepseekv3"] | {"call": CALL, "multi": CALL}
WRITTEN["lfm2_v2"] = WRITTEN["lfm2"] | {
    "call": LFM_CALL,
    "multi": f"{LFM_CALL}{LFM_RESULT}⟦At 06:10.<|im_end|>⟧",
}

CUT = {  # where a prompt ends before what the template writes at inference
    "nemotron_3_nano": {"system", "call", "multi"},  # inference opens with <think> and a line break
    "deepseekv3": {"system", "call", "multi"},  # inference opens with <think>, which a whole dialogue lacks
    "qwen3_5_nothink": {"think", "reason"},  # inference opens with an empty thought
}
CUT["nemotron_3_super"], CUT["deepseek_r1_distill"] = CUT["nemotron_3_nano"], CUT["deepseekv3"]


def load(template: str, **options: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(template_tokenizer(template), **options)


@pytest.mark.parametrize("name", ["system", "think", "reason", "call", "multi"])
@pytest.mark.parametrize("template", FAMILIES)
def test_golden_text(template: str, name: str) -> None:
    """The answer as the model writes it, and why a dialogue is refused that the template cannot write."""
    tokenizer = load(template)
    prompt, answer, tools = dialogue(template, name)
    expected = WRITTEN[template][name]
    if "⟦" not in expected:
        with pytest.raises(ValueError, match=f"the chat template should .*, but it .*{expected}") as caught:
            encode(tokenizer, prompt, answer, tools=tools)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
        return
    encoded = encode(tokenizer, prompt, answer, tools=tools)
    question = prompt[-1]["content"]
    assert show(tokenizer, encoded).rpartition(question)[2] == OPENINGS[template] + expected
    assert encoded.is_cut == (name in CUT.get(template, ())) and not encoded.is_continued


STARTS = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1+1?",
    "llama3_1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n1+1?",
    "qwen2_5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n<|im_start|>user\n1+1?",
    "qwen3": "<|im_start|>user\n1+1?",
    "gemma3": "<bos><start_of_turn>user\n1+1?",
    "phi3": "<|user|>1+1?",
    "deepseekv3": "<｜begin▁of▁sentence｜><｜User｜>1+1?",
    "glm4moe": "[gMASK]<sop><|user|>\n1+1?",
    "cohere": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>1+1?",
    "lfm2": "<|startoftext|><|im_start|>user\n1+1?",
}


@pytest.mark.parametrize("template", STARTS)
def test_golden_beginning(template: str) -> None:
    tokenizer = load(template)
    encoded = encode(tokenizer, *DIALOGUES["plain"][:2])
    assert show(tokenizer, encoded).startswith(STARTS[template] + OPENINGS[template])


@pytest.mark.parametrize(
    "template", [name for name in FAMILIES if name not in CUT or name == "qwen3_5_nothink"]
)
def test_a_dialogue_that_the_template_has_written_already(template: str) -> None:
    """Rows of text with the control tokens in them have the ids of the rows that they were made of."""
    tokenizer = load(template)
    own, prompt = tokenizer.tokenizer, [user("1+1?")]
    opening = own.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    answer = own.apply_chat_template([*prompt, assistant("2")], tokenize=False).removeprefix(opening)
    encoded = encode(tokenizer, prompt, [assistant("2")])
    assert tokenizer.is_template_text(opening)
    space = "" if template == "glm4moe" else " \n"  # behind an end of turn; GLM's template writes none
    given = tokenizer.encode_example(opening, [answer, answer.rstrip(), answer + space])
    assert given.prompt == encoded.prompt and given.completions == [encoded.completions[0]] * 3
