"""Examples -> a training part and an evaluation part."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from dpo_wrapper.data.examples import Example
from dpo_wrapper.data.rows.messages import Message


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
    splits, digests = [example.split for example in examples], list(map(prompt_digest, examples))
    train, test = split_rows(splits, digests, fraction, seed)
    return [examples[k] for k in train], [examples[k] for k in test]


def split_rows(
    splits: Sequence[str | None], prompt_digests: Sequence[int], fraction: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Indices of the rows to train and to evaluate on, as `split_examples` chooses them.

    Args:
        splits: of each row, 'train', 'test' or None.
        prompt_digests: of each row its `prompt_digest`.
        fraction, seed: as in `split_examples`.
    """
    if not isinstance(fraction, (int, float)) or not 0 <= fraction < 1:
        raise ValueError(f"the fraction should be in [0, 1), but it is {fraction!r}: take 0.1 for a tenth.")
    if not len(splits):
        raise ValueError("there should be examples to split, but there are none: read some first.")
    if any(splits):
        is_test = [split == "test" for split in splits]
        if all(is_test):
            problem = "some rows should be for training, but all are marked as test"
            raise ValueError(f"{problem}: mark some as 'train' or remove the split field.")
        if fraction and not any(is_test):
            problem = "some rows should be for evaluation, but all are marked as train"
            raise ValueError(f"{problem}: mark some as 'test', drop the split field or take a fraction of 0.")
    else:
        test_digests = _choose_prompts(prompt_digests, fraction, seed) if fraction else set()
        is_test = [digest in test_digests for digest in prompt_digests]
    parts: tuple[list[int], list[int]] = ([], [])
    for index, is_in_test in enumerate(is_test):
        parts[is_in_test].append(index)
    return parts


def count_shared_prompts(train: Sequence[Example], eval: Sequence[Example]) -> int:
    """Number of the examples to evaluate on whose prompt is one that is trained on."""
    digests = set(map(prompt_digest, train))
    return sum(prompt_digest(example) in digests for example in eval)


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


def _choose_prompts(digests: Sequence[int], fraction: float, seed: int) -> set[int]:
    sizes = Counter(digests)
    if len(sizes) < 2:
        problem = "there should be at least two different prompts to split off some, but there is one"
        raise ValueError(f"{problem}: add rows, or split none off (--eval-fraction 0).")
    order = sorted(sizes, key=lambda digest: hashlib.sha256(f"{seed}\n{digest}".encode()).digest())
    target = fraction * len(digests)
    chosen: set[int] = set()
    count = 0
    for digest in order[:-1]:  # the last one is always for training
        # A prompt is taken where that comes closer to the target; one with very many rows is passed over.
        if abs(count + sizes[digest] - target) < abs(count - target):
            chosen.add(digest)
            count += sizes[digest]
    return chosen or {min(order, key=lambda digest: sizes[digest])}
