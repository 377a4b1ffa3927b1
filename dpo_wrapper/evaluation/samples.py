"""Completions that a model writes for a few prompts, as a person reads them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dpo_wrapper.data import TokenizedExample, Tokenizer
from dpo_wrapper.display.terminal import replace_controls
from dpo_wrapper.evaluation.generate import generate, list_end_ids

MAX_COMPLETION_TOKENS = 120

MAX_OPENING_TOKENS = 24
"""Tokens of a text without a prompt that a model is given to continue."""


@dataclass(frozen=True)
class SamplePrompt:
    """Token ids of a prompt, and of the completion that the data has for it."""

    ids: list[int]
    completion: list[int]


def find_prompts(parts: Sequence[Sequence[TokenizedExample]], count: int) -> list[SamplePrompt]:
    """The first prompts that differ and have a completion to imitate, of the first part that has any.

    Of an example without a prompt the first tokens are one.
    """
    for examples in parts:
        prompts: dict[tuple[int, ...], SamplePrompt] = {}
        for example in examples:
            if len(prompts) == count:
                break
            if example.sft_completion:
                prompt = split_prompt(example)
                prompts.setdefault(tuple(prompt.ids), prompt)
        if prompts:
            return [*prompts.values()]
    return []


def split_prompt(example: TokenizedExample) -> SamplePrompt:
    ids = [*example.prompt, *(example.sft_completion or ())]
    num_prompt = len(example.prompt)
    if num_prompt < 2:  # nothing but a BOS
        num_prompt = min(MAX_OPENING_TOKENS, (len(ids) + 1) // 2)
    return SamplePrompt(ids[:num_prompt], ids[num_prompt:])


def generate_completions(
    model: nn.Module,
    prompts: Sequence[SamplePrompt],
    tokenizer: Tokenizer,
    max_positions: int | None,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """The greedy completion of each prompt; `progress` as in `generate`."""
    ids = [prompt.ids for prompt in prompts]
    options: dict[str, Any] = {"max_positions": max_positions, "progress": progress}
    completions = generate(model, ids, MAX_COMPLETION_TOKENS, list_end_ids(tokenizer), **options)
    return [tokenizer.decode(completion) for completion in completions]


def format_sample(texts: Mapping[str, str | None], max_chars: int = 300) -> str:
    """A prompt and its completions, each on a line behind its name; None is left out.

    Of a long prompt the end is shown, of a long completion the beginning.
    """
    return "\n".join(
        f"{name:9}  {shorten(text, max_chars, keep_end=name == 'prompt') or '(empty)'}"
        for name, text in texts.items()
        if text is not None
    )


def format_samples(records: Sequence[Mapping[str, Any]], max_chars: int = 300) -> str:
    """Lines of samples.jsonl, below one another."""
    names = ("reference", "policy", "chosen")
    texts = [{"prompt": one["readable_prompt"], **{name: one[name] for name in names}} for one in records]
    return "\n\n".join(format_sample(one, max_chars) for one in texts)


def select_last_samples(records: Sequence[Mapping[str, Any]], stage: str) -> list[Mapping[str, Any]]:
    """The lines of samples.jsonl of the last step of a stage that has any."""
    of_stage = [one for one in records if one["stage"] == stage]
    return [one for one in of_stage if one["step"] == of_stage[-1]["step"]]


def shorten(text: str, max_chars: int = 300, *, keep_end: bool = False) -> str:
    """The text on one line, without what a terminal would obey; of a long text the beginning, or the end."""
    line = replace_controls(" ".join(text.split()))
    if len(line) <= max_chars:
        return line
    return f"…{line[-max_chars:]}" if keep_end else f"{line[:max_chars]}…"
