"""Tiny Hugging Face tokenizers, saved to a folder as real ones are, for the tests of `dpo_wrapper.data`."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dpo_wrapper.data import ByteTokenizer, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = "<s>" + CHATML
TRIMS = CHATML.replace("m.content", "m.content | trim")
WITHOUT_EOS = CHATML.replace("<|im_end|>", "")
NO_PREFIX = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
DROPS_THOUGHT = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
SAYS_MORE = CHATML.replace("<|im_end|>\n", "<|im_end|>\nsee you{{ '' }}")
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)
CRASHES = "{{ messages[0].content + 1 }}"

_SENTENCES = [
    "Hello there, how are you today? I am fine, thank you.",
    "Human: what is the capital of France? Assistant: The capital of France is Paris.",
    "<|im_start|>user assistant system tool",
]


@cache
def trained_bytes() -> str:
    """A byte-level BPE, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_SENTENCES, trainer)
    return model.to_str()


def save_tokenizer(
    folder: Path,
    *,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    unk: str | None = None,
    template: str | None = None,
    puts_bos: bool = True,
) -> Path:
    """A folder with a tokenizer of these special tokens; '<|im_end|>' is the natural EOS for ChatML."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer.from_str(trained_bytes())
    if bos and puts_bos:  # as Llama's does, it puts a BOS (here also an EOS) around every text
        ids = [(token, model.token_to_id(token)) for token in {bos, "</s>"}]
        single, pair = f"{bos} $A </s>", f"{bos} $A </s> $B </s>"
        model.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return folder


def encode_completion(tokenizer, prompt, completion):
    """The ids of one completion of a prompt."""
    return tokenizer.encode_example(prompt, [completion]).completions[0]


class NoBos(ByteTokenizer):
    """Bytes without a BOS; the prompt '' has no token at all."""

    bos_id = None  # type: ignore[assignment]

    def encode_prompt(self, prompt: str | tuple[Message, ...], tools: Sequence[Any] = ()) -> list[int]:
        return super().encode_prompt(prompt, tools)[1:]
