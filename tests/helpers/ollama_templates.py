"""Chat templates of the kinds that models ship with, written short, on tiny tokenizers."""

from typing import Any

from dpo_wrapper.data import HuggingFaceTokenizer
from helpers.chat_templates import WORDS, template_tokenizer
from helpers.tokenizers import CHATML, trained_bytes

ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('no such order') }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a tiny helper.<|im_end|>\n{% endif %}"
)
SPLIT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = none %}{% set turns = messages %}{% endif %}"
)
MISTRAL = (  # the system message in the first question
    SPLIT_SYSTEM + "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}[INST] "
    "{% if loop.first and system is not none %}{{ system }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_LAST = MISTRAL.replace("loop.first", "loop.last")
LLAMA_2 = (  # each question begins with a BOS
    SPLIT_SYSTEM + "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system is not none %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (  # no token ends a turn of the user
    SPLIT_SYSTEM + "{{ bos_token }}{{ (system or 'A chat.') + ' ' }}{% for m in turns %}"
    "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PLAIN_TURNS = (  # nothing but a line break ends an answer
    "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant> {% endif %}"
)
COUNTED = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}")
"""No template of Go could count, but the pieces that were found in short dialogues look right."""

TWICE = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}")

OWN: dict[str, tuple[str, str | None, str]] = {  # template, BOS, EOS
    "chatml": (CHATML, None, "<|im_end|>"),
    "chatml_default": (DEFAULT_SYSTEM + CHATML, "<|im_start|>", "<|im_end|>"),
    "mistral": (MISTRAL, "<s>", "</s>"),
    "mistral_last": (MISTRAL_LAST, "<s>", "</s>"),
    "mistral_alternates": (ALTERNATE + MISTRAL, "<s>", "</s>"),
    "llama_2": (LLAMA_2, "<s>", "</s>"),
    "zephyr": (ZEPHYR, "<s>", "</s>"),
    "vicuna": (VICUNA, "<s>", "</s>"),
    "plain_turns": (PLAIN_TURNS, "<s>", "</s>"),
    "braces": (CHATML.replace("<|im_end|>", "{{ '{{\"}}' }}<|im_end|>"), None, "<|im_end|>"),
    "hidden": (CHATML.replace("\n{{ m.content", '\u200b """{{ m.content'), None, "<|im_end|>"),
    "counted": (COUNTED, None, "<|im_end|>"),
    "twice": (TWICE, None, "<|im_end|>"),
}
SHIPPED = (
    "llama3", "llama3_1", "llama3_2", "gemma", "gemma3", "phi3", "qwen2_5", "qwen3", "qwen3_8", "glm4moe",
    "deepseek_r1_distill", "nemotron_3_nano", "cohere",
)  # fmt: skip


def make_tokenizer(name: str) -> HuggingFaceTokenizer:
    """A tokenizer with a template of this module, or with one that TRL ships."""
    if name in SHIPPED:
        return HuggingFaceTokenizer(template_tokenizer(name))
    template, bos, eos = OWN[name]
    return HuggingFaceTokenizer(build_tokenizer(template, bos, eos))


def build_tokenizer(template: str | None, bos: str | None, eos: str) -> Any:
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer.from_str(trained_bytes())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer
