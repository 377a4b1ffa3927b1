"""Generate completions with the library that a model comes from."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpo_wrapper.data import Tokenizer
from dpo_wrapper.models.eval_mode import eval_mode

MAX_BATCH_SIZE = 64
"""Number of prompts that are continued at once."""


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    *,
    max_positions: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """The greedy completion of each prompt, through its end token if there is one.

    Each token is the one of the largest logit, whatever else a model's generation config asks for. Keys and
    values are cached. Prompts of one length are continued together, so there is no padding. The model is
    computed in eval mode, and otherwise as the caller has prepared it: inside `Reference.frozen()` it is the
    reference.

    Args:
        model: a causal LM of transformers, with or without a PEFT adapter, or one of x-transformers.
        prompts: token ids; none is empty.
        max_new_tokens: maximum length of a completion, its end token included.
        end_ids: the tokens that end a completion, the usual one first.
        max_positions: length of the model's table of positions, if it has one. Of a prompt that leaves no
            room in it the last tokens are used.
        progress: called with the number of prompts that were just continued.
    """
    if max_positions is not None:
        max_new_tokens = min(max_new_tokens, max_positions // 2)
        prompts = [prompt[-(max_positions - max_new_tokens) :] for prompt in prompts]
    indices: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        indices[len(prompt)].append(index)
    completions: list[list[int]] = [[] for _ in prompts]
    continue_prompts = _continue_hugging_face if hasattr(model, "generation_config") else _continue_decoder
    device = next(model.parameters()).device
    with eval_mode(model):
        for group in indices.values():
            for start in range(0, len(group), MAX_BATCH_SIZE):
                batch = group[start : start + MAX_BATCH_SIZE]
                ids = torch.tensor([list(prompts[index]) for index in batch], device=device)
                output = continue_prompts(model, ids, max_new_tokens, end_ids).tolist()
                for index, completion in zip(batch, output, strict=True):
                    completions[index] = cut_at_end(completion, end_ids)
                if progress is not None:
                    progress(len(batch))
    return completions


def list_end_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens that end a completion: that of an answer in a dialogue, and that of a text."""
    return tokenizer.end_of_turn_id, tokenizer.eos_id


def cut_at_end(completion: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """The completion through its first end token; the whole of it if it has none."""
    length = next((k + 1 for k, id_ in enumerate(completion) if id_ in end_ids), len(completion))
    return list(completion[:length])


def _continue_hugging_face(model: Any, ids: Tensor, max_new_tokens: int, end_ids: Sequence[int]) -> Tensor:
    with _bare_generation_config(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
        )
    return output[:, ids.shape[1] :]


@contextmanager
def _bare_generation_config(model: Any) -> Iterator[None]:
    """Take away a model's own defaults for generation, such as a penalty for repetitions, for a while."""
    from transformers import GenerationConfig

    modules = [module for module in model.modules() if "generation_config" in vars(module)]
    configs = [module.generation_config for module in modules]
    for module in modules:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in zip(modules, configs, strict=True):
            module.generation_config = config


def _continue_decoder(model: Any, ids: Tensor, max_new_tokens: int, end_ids: Sequence[int]) -> Tensor:
    from x_transformers import AutoregressiveWrapper

    wrapper: Any = AutoregressiveWrapper(getattr(model, "net", model))
    wrapper.train = lambda mode=True: wrapper  # it would call .eval() and .train() of the whole model
    # keys are cached with their positions: a window that moves along would mix up old positions and new ones
    return wrapper.generate(
        ids,
        max_new_tokens,
        temperature=0.0,
        eos_token=end_ids[0],
        cache_kv=True,
        restrict_to_max_seq_len=False,
    )
