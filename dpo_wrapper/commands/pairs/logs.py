"""Logs -> prompts with their recorded answers, as text and as the tokens that a model continues."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from dpo_wrapper.data.errors import ExampleError, OnError, collect_errors
from dpo_wrapper.data.examples import Example
from dpo_wrapper.data.rows.messages import Turns, join_answer
from dpo_wrapper.data.tokens.encode import as_dialogue, check_has_text, is_text
from dpo_wrapper.data.tokens.encoded import EncodedExample
from dpo_wrapper.data.tokens.options import OnLong
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.data.tokens.truncate import cut_dialogue, cut_prompt


@dataclass(frozen=True)
class LoggedAnswer:
    """A prompt with its recorded answer.

    Attributes:
        example: with the recorded answer as its only completion.
        prompt_ids: Int[k], what the model continues.
        is_dialogue: whether a chat template or markers of turns stand around the answer.
    """

    example: Example
    prompt_ids: tuple[int, ...]
    is_dialogue: bool

    def clean_answer(self, text: str) -> str:
        """A sampled answer without the white space around it where that belongs to the markers of turns."""
        return text.strip() if self.is_dialogue else text


@dataclass
class Logs:
    """What was read of logs.

    Attributes:
        max_length: the most tokens of a prompt.
        answers: in the order of the files.
        errors: of rows that cannot be used and were left out.
        counts: of prompts that were cut or left out because they are too long, 'cut' and 'dropped'.
    """

    max_length: int
    answers: list[LoggedAnswer] = field(default_factory=list)
    errors: list[ExampleError] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def encode_logs(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    as_chat: bool | None = None,
    on_long: OnLong = "cut",
    on_error: OnError = "raise",
    needs_answer: bool = True,
) -> Logs:
    """Tokenize the prompts of examples that have one completion each.

    Args:
        examples: of type prompt_completion.
        tokenizer: of the model that answers.
        max_length: number of tokens that a prompt may have.
        as_chat: as in `TokenizeOptions`.
        on_long: what becomes of a longer prompt: 'cut' cuts it as in training, 'drop' leaves it out, and
            'error' refuses it.
        on_error: 'raise' stops at the first example that cannot be used; 'skip' leaves such ones out.
        needs_answer: whether a recorded answer without text is refused.

    Raises:
        ExampleError: an example has no prompt or no answer, or the tokenizer refuses it.
    """
    logs = Logs(max_length)
    for example in examples:
        with collect_errors(logs.errors, on_error, example.source):
            answer = encode_log(example, tokenizer, as_chat, needs_answer)
            if len(answer.prompt_ids) > max_length:
                if on_long == "error":
                    raise ExampleError(
                        f"a prompt should have at most {max_length:,} tokens, but it has "
                        f"{len(answer.prompt_ids):,}: raise --max-length, lower --max-new-tokens, or cut or "
                        "leave out such rows by --on-long cut or drop."
                    )
                logs.counts["dropped" if on_long == "drop" else "cut"] += 1
                if on_long == "drop":
                    continue
                ids = list(answer.prompt_ids)
                dialogue = as_dialogue(answer.example, tokenizer, as_chat)
                if not isinstance(dialogue.prompt, str):
                    prompt = cut_dialogue(dialogue.prompt, dialogue.tools, max_length, tokenizer)
                    ids = tokenizer.encode_prompt(prompt, dialogue.tools)
                cut = cut_prompt(EncodedExample(ids, []), max_length, tokenizer)
                answer = replace(answer, prompt_ids=tuple(cut.prompt))
            logs.answers.append(answer)
    return logs


def encode_log(
    example: Example, tokenizer: Tokenizer, as_chat: bool | None, needs_answer: bool
) -> LoggedAnswer:
    """The tokens of an example's prompt, whatever their number."""
    if is_text(example):
        raise ExampleError(
            "a log should hold a prompt with its answer, but this row is a text without a prompt: write it "
            "as messages, or as prompt and completion."
        )
    if needs_answer:
        check_has_text(example)
    example = split_last_answer(example)
    dialogue = as_dialogue(example, tokenizer, as_chat)
    ids = tokenizer.encode_prompt(dialogue.prompt, dialogue.tools)
    if not ids:
        raise ExampleError("a prompt should have tokens, but it is empty: fill it in, or leave the row out.")
    return LoggedAnswer(example, tuple(ids), not isinstance(dialogue.prompt, str))


def split_last_answer(example: Example) -> Example:
    """The example with the last turn of its completion as the answer, and those before it in the prompt."""
    completion = example.completions[0]
    if isinstance(completion, str) or isinstance(example.prompt, str) or len(completion) == 1:
        return example
    prompt: Turns = join_answer(example.prompt, completion[:-1])
    last = completion[-1]
    return replace(example, prompt=prompt, completions=((last,) if last.extras else last.text,))
