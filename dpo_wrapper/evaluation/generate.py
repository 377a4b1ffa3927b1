"""Generate completions with the library that a model comes from."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dpo_wrapper.data import Tokenizer
from dpo_wrapper.evaluation.sampling import Sampling, TokenSampler, derive_seed
from dpo_wrapper.models.eval_mode import eval_mode

MAX_BATCH_SIZE = 64
"""Number of prompts that are continued at once."""

Choose = Callable[[Float[Tensor, "b v"]], Int[Tensor, "b"]]
"""Chooses the next token of each sequence of a batch by its logits."""


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    *,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    pads: bool = False,
    max_positions: int | None = None,
    progress: Callable[[int], object] | None = None,
    on_tokens: Callable[[Int[Tensor, "b"]], object] | None = None,
) -> list[list[int]]:
    """The completion of each prompt, through its end token if there is one.

    Without `sampling` each token is the one of the largest logit. With it, the completion of a prompt is what
    the model's own library samples for this prompt alone after `torch.manual_seed(seed)`, whatever else is
    sampled beside it or before; but batches of other shapes may round logits otherwise. A model's own
    generation config has no effect.

    Keys and values are cached. Prompts of one length are continued together, so there is no padding unless
    `pads` is set. The model is computed in eval mode, and otherwise as the caller has prepared it: inside
    `Reference.frozen()` it is the reference.

    Args:
        model: a causal LM of transformers, with or without a PEFT adapter, or one of x-transformers.
        prompts: token ids; none is empty.
        max_new_tokens: maximum length of a completion, its end token included.
        end_ids: the tokens that end a completion, the usual one first.
        sampling: how tokens are drawn; None for greedy completions.
        seeds: one for each prompt; by default `derive_seed(sampling.seed, k)` for prompt `k`.
        pads: continue prompts of different lengths together, padded on the left, for which
            `computes_padding_alike(model, ...)` should be true.
        max_positions: length of the model's table of positions, if it has one. Of a prompt that leaves no
            room in it the last tokens are used.
        progress: called with the number of prompts that were just continued.
        on_tokens: called with the next token of each prompt of a batch, as soon as it is chosen. What it
            raises ends the generation.
    """
    if max_positions is not None:
        max_new_tokens = min(max_new_tokens, max_positions // 2)
        prompts = [prompt[-(max_positions - max_new_tokens) :] for prompt in prompts]
    if sampling is not None and seeds is None:
        seeds = [derive_seed(sampling.seed, number) for number in range(len(prompts))]
    completions: list[list[int]] = [[] for _ in prompts]
    device = next(model.parameters()).device
    with eval_mode(model):
        for batch in list_batches([len(prompt) for prompt in prompts], pads):
            choose: Choose | None = None
            if sampling is not None and seeds is not None:
                choose = TokenSampler(sampling, [seeds[index] for index in batch], device)
            if on_tokens is not None:
                choose = _watch_choice(choose or _choose_largest, on_tokens)
            ids = [prompts[index] for index in batch]
            output = continue_prompts(model, ids, max_new_tokens, end_ids, choose).tolist()
            for index, completion in zip(batch, output, strict=True):
                completions[index] = cut_at_end(completion, end_ids)
            if progress is not None:
                progress(len(batch))
    return completions


def _choose_largest(logits: Float[Tensor, "b v"]) -> Int[Tensor, "b"]:
    return logits.argmax(dim=-1)


def _watch_choice(choose: Choose, on_tokens: Callable[[Int[Tensor, "b"]], object]) -> Choose:
    def choose_and_tell(logits: Float[Tensor, "b v"]) -> Int[Tensor, "b"]:
        tokens = choose(logits)
        on_tokens(tokens)
        return tokens

    return choose_and_tell


def list_batches(lengths: Sequence[int], pads: bool) -> Iterator[list[int]]:
    """Indices of prompts that are continued together: of one length, or of similar ones if `pads`."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [order] if pads else [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
    for group in groups:
        for start in range(0, len(group), MAX_BATCH_SIZE):
            yield group[start : start + MAX_BATCH_SIZE]


def list_end_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens that end a completion: that of an answer in a dialogue, and that of a text."""
    return tokenizer.end_of_turn_id, tokenizer.eos_id


def cut_at_end(completion: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """The completion through its first end token; the whole of it if it has none."""
    length = next((k + 1 for k, id_ in enumerate(completion) if id_ in end_ids), len(completion))
    return list(completion[:length])


def continue_prompts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    choose: Choose | None,
) -> Int[Tensor, "b n"]:
    """The next tokens of prompts, which are padded on the left where they differ in length.

    What follows an end is anything. The largest logit chooses a token if `choose` is None.
    """
    is_hugging_face = hasattr(model, "generation_config")
    continue_batch = _continue_hugging_face if is_hugging_face else _continue_decoder
    return continue_batch(model, prompts, max_new_tokens, end_ids, choose)


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """The ids of prompts behind padding, and a mask that is False on padding."""
    longest = max(map(len, prompts))
    ids = [[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    is_real = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return torch.tensor(ids, device=device), is_real


def prefer_tokens(logits: Float[Tensor, "b v"], tokens: Int[Tensor, "b"]) -> Float[Tensor, "b v"]:
    """Logits that leave these tokens alone to choose."""
    return torch.full_like(logits, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def _continue_hugging_face(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    choose: Choose | None,
) -> Tensor:
    from transformers import LogitsProcessorList

    def process_logits(_: Tensor, logits: Tensor) -> Tensor:
        return logits if choose is None else prefer_tokens(logits, choose(logits))

    ids, is_real = pad_prompts(prompts, end_ids[0], next(model.parameters()).device)
    with _bare_generation_config(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=is_real.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
            logits_processor=LogitsProcessorList([process_logits]),
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


def _continue_decoder(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    choose: Choose | None,
) -> Tensor:
    from x_transformers import AutoregressiveWrapper

    device = next(model.parameters()).device
    pad_id = int(end_ids[0] == 0)  # padding is no end
    wrapper: Any = AutoregressiveWrapper(getattr(model, "net", model), pad_value=pad_id)
    wrapper.train = lambda mode=True: wrapper  # it would call .eval() and .train() of the whole model
    # a prompt with an end would count as one that has ended
    has_end = any(end_ids[0] in prompt for prompt in prompts)
    is_padded = len({len(prompt) for prompt in prompts}) > 1
    rows: Any = [torch.tensor(list(prompt), device=device) for prompt in prompts]
    with nullcontext() if choose is None else _fork_rng(device):  # one token alone is left to its draw
        # keys are cached with their positions: a window that moves along would mix up old and new positions
        return wrapper.generate(
            rows if is_padded else torch.stack(rows),
            max_new_tokens,
            temperature=0.0 if choose is None else 1.0,
            filter_logits_fn=lambda logits: prefer_tokens(logits, choose(logits)) if choose else logits,
            eos_token=None if has_end else end_ids[0],
            cache_kv=True,
            restrict_to_max_seq_len=False,
        )


def _fork_rng(device: torch.device) -> Any:
    """A context after which torch's random state is as before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
