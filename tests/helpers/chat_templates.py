"""Tiny tokenizers with the chat templates that TRL ships, and dialogues that try them."""

import os
from functools import cache
from pathlib import Path
from typing import Any

from dpo_wrapper.data import HuggingFaceTokenizer
from dpo_wrapper.data.rows.messages import parse_messages
from dpo_wrapper.data.tokens.encoded import EncodedExample
from helpers.tokenizers import trained_bytes

QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINKING = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
LLAMA = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>",
]  # fmt: skip
GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
GEMMA_4 = [
    "<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>",
    '<|"|>', "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|think|>",
]  # fmt: skip
PHI = ["<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
GPT_OSS = [
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>",
]  # fmt: skip
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
DEEPSEEK_ADDED = [  # the real tokenizers do not declare these to be special
    "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>",
]  # fmt: skip
GLM = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM_ADDED = [*THINKING, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"]
COHERE = [
    "<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
]  # fmt: skip
LFM = [
    "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_list_start|>",
    "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>",
     "<|tool_response_end|>",
]  # fmt: skip

# template: special tokens, other added tokens, BOS, EOS
FAMILIES: dict[str, tuple[list[str], list[str], str | None, str]] = {
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), (LLAMA, [], LLAMA[0], "<|eot_id|>")),
    **dict.fromkeys(
        (
            "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "qwen3_8",
             "nemotron_3_nano",
            "nemotron_3_super",
        ),
        (QWEN, THINKING, None, "<|im_end|>"),
    ),
    **dict.fromkeys(("gemma", "gemma3"), (GEMMA, [], "<bos>", "<eos>")),
    **dict.fromkeys(("gemma4", "gemma4_v5"), (GEMMA_4, [], "<bos>", "<eos>")),
    **dict.fromkeys(("phi3", "phi3_5"), (PHI, [], "<s>", "<|endoftext|>")),
    "gptoss": (GPT_OSS, [], GPT_OSS[0], "<|return|>"),
    **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), (DEEPSEEK, DEEPSEEK_ADDED, *DEEPSEEK)),
    "glm4moe": (GLM, GLM_ADDED, None, "<|endoftext|>"),
    **dict.fromkeys(("cohere", "cohere2"), (COHERE, [], "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>")),
    **dict.fromkeys(("lfm2", "lfm2_v2"), (LFM, [], "<|startoftext|>", "<|im_end|>")),
}  # fmt: skip

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3, Qwen and gpt-oss cut text before it is merged: line breaks never merge with what follows."""


def template_text(name: str) -> str:
    import trl

    path = Path(os.path.dirname(trl.__file__)) / "chat_templates" / f"{name}.jinja"
    return path.read_text(encoding="utf-8")


@cache
def template_tokenizer(name: str) -> Any:
    """A tokenizer of transformers with a template of TRL and the added tokens that go with it."""
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special, added, bos, eos = FAMILIES[name]
    model = Tokenizer.from_str(trained_bytes())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    strips = name.startswith("phi3")  # its tokens take the white space behind them
    model.add_special_tokens([AddedToken(t, rstrip=strips, normalized=False) for t in special])
    model.add_tokens([AddedToken(t, normalized=False) for t in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template_text(name)
    return tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **extras: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extras}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(port: str, name: str = "tide") -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": f'{{"port": "{port}"}}'}}


TOOL = {"role": "tool", "name": "tide", "tool_call_id": "c1", "content": "06:10"}
PORT = {"type": "object", "properties": {"port": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "High tide", "parameters": PORT}}]


DIALOGUES: dict[str, tuple[list[Any], list[Any], list[Any]]] = {  # prompt, answer, tools
    "plain": ([user("1+1?")], [assistant("2")], []),
    "system": ([system("Be brief."), user("1+1?"), assistant("2"), user("2+2?")], [assistant("4")], []),
    "think": ([user("1+1?")], [assistant("<think>\nOne and one.\n</think>\n\n2")], []),
    "reason": ([user("1+1?")], [assistant("2", reasoning_content="Twice 1.")], []),
    "call": ([user("Tide in Brest?")], [assistant(None, tool_calls=[call("Brest")])], TOOLS),
    "tool": (
        [user("Tide in Brest?"), assistant("", tool_calls=[call("Brest")]), TOOL],
        [assistant("At 06:10.")],
        TOOLS,
    ),
    "multi": (
        [user("Tide in Brest?")],
        [assistant("", tool_calls=[call("Brest")]), TOOL, assistant("At 06:10.")],
        TOOLS,
    ),
    "follow": ([user("1+1?")], [assistant("2"), user("2+2?"), assistant("4")], []),
    "prefill": ([user("1+1?"), assistant("The answer is")], [assistant(" 2.")], []),
    "developer": ([{"role": "developer", "content": "Be brief."}, user("1+1?")], [assistant("2")], []),
}


def dialogue(template: str, name: str) -> tuple[list[Any], list[Any], list[Any]]:
    """A dialogue for a template: DeepSeek's know tool calls, but write no list of tools."""
    prompt, answer, tools = DIALOGUES[name]
    return prompt, answer, [] if template.startswith("deepseek") else tools


def control_tokens(tokenizer: HuggingFaceTokenizer) -> dict[int, str]:
    """The added tokens by id, but for the tags that a model writes in its answers."""
    added = {id_: str(token) for id_, token in tokenizer.tokenizer.added_tokens_decoder.items()}
    return {id_: text for id_, text in added.items() if text not in GLM_ADDED}


def encode(
    tokenizer: HuggingFaceTokenizer,
    prompt: list[Any],
    *answers: list[Any],
    tools: Any = (),
    score: Any = "last",
) -> EncodedExample:
    turns = [parse_messages(answer, "chosen") for answer in answers]
    return tokenizer.encode_example(parse_messages(prompt, "prompt"), turns, tools, score)


def show(tokenizer: HuggingFaceTokenizer, encoded: EncodedExample, number: int = 0) -> str:
    """Prompt and completion as text with special tokens, what is scored between ⟦ and ⟧."""
    ids = [*encoded.prompt, *encoded.completions[number]]
    count = len(encoded.prompt)
    scored = encoded.scored[number] if encoded.scored else [k >= count for k in range(len(ids))]
    text, start = "", 0
    for k in range(1, len(ids) + 1):
        if k == len(ids) or scored[k] != scored[start]:
            part = tokenizer.decode(ids[start:k], skip_special_tokens=False)
            text += f"⟦{part}⟧" if scored[start] else part
            start = k
    return text
