"""Examples -> a training part and an evaluation part."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from dpo_wrapper.data.examples import Example
from dpo_wrapper.data.messages import Message


def split_examples(
    examples: Sequence[Example], fraction: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split examples into those to train on and those to evaluate on, both in the order of `examples`.

    Where any example has a split, the data decides, whatever the fraction: 'test' is for evaluation, all else
    is for training. Otherwise about `fraction` of the examples is for evaluation, all examples of one prompt
    together, so that no prompt stands in both parts. The choice depends on the prompts and the seed alone,
    not on the order of the examples or on the process.

    Args:
        examples: at least one.
        fraction: from 0 (no evaluation part) to below 1 (at least one example in either part).
        seed: of the choice.

    Raises:
        ValueError: there is no example, the fraction is out of range, nothing is left to train on, or, unless
            the fraction is 0, nothing is left to evaluate on or there is only one prompt.
    """
    if not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise ValueError(f"the fraction should be in [0, 1), but it is {fraction!r}: take 0.1 for a tenth.")
    if not examples:
        raise ValueError("there should be examples to split, but there are none: read some first.")
    if any(example.split for example in examples):
        is_test = [example.split == "test" for example in examples]
        if all(is_test):
            problem = "some rows should be for training, but all are marked as test"
            raise ValueError(f"{problem}: mark some as 'train' or remove the split field.")
        if fraction and not any(is_test):
            problem = "some rows should be for evaluation, but all are marked as train"
            raise ValueError(f"{problem}: mark some as 'test', drop the split field or take a fraction of 0.")
    else:
        keys = list(map(_prompt_key, examples))
        test_keys = _choose_keys(keys, fraction, seed) if fraction else set()
        is_test = [key in test_keys for key in keys]
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, is_in_test in zip(examples, is_test, strict=True):
        parts[is_in_test].append(example)
    return parts


def count_shared_prompts(train: Sequence[Example], eval: Sequence[Example]) -> int:
    """Number of the examples to evaluate on whose prompt is one that is trained on."""
    keys = set(map(_prompt_key, train))
    return sum(_prompt_key(example) in keys for example in eval)


def _prompt_key(example: Example) -> str:
    """One text per prompt; plain text is the same prompt as a dialogue of that one question.

    Texts without a prompt stand for themselves, and ids of messages do not count.
    """
    prompt = example.prompt or repr(example.completions)
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    names = ("role", "content", "tool_calls")
    parts = [{key: value for key, value in turn.as_dict().items() if key in names} for turn in turns]
    return json.dumps(parts, sort_keys=True, default=str)


def prompt_digest(example: Example) -> int:
    """64 bits of a hash of the prompt: equal for equal prompts, in every process."""
    return int.from_bytes(hashlib.blake2b(_prompt_key(example).encode(), digest_size=8).digest(), "little")


def _choose_keys(keys: list[str], fraction: float, seed: int) -> set[str]:
    sizes = Counter(keys)
    if len(sizes) < 2:
        problem = "there should be at least two different prompts to split off some, but there is one"
        raise ValueError(f"{problem}: add rows or split off a fraction of 0.")
    order = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    target = fraction * len(keys)
    chosen: set[str] = set()
    count = 0
    for key in order[:-1]:  # the last one is always for training
        # A prompt is taken where that comes closer to the target; one with very many examples is passed over.
        if abs(count + sizes[key] - target) < abs(count - target):
            chosen.add(key)
            count += sizes[key]
    return chosen or {min(order, key=lambda key: sizes[key])}
