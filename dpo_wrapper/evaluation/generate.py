"""Generate completions with the library that a model comes from."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch


@torch.no_grad()
def generate(
    model: Any,
    prompt_ids: list[int],
    max_new_tokens: int,
    end_ids: Sequence[int],
    max_positions: int | None = None,
) -> list[int]:
    """The greedy completion: each token is the most likely one. The end token is left out.

    Of a prompt that leaves no room in the model's table of positions the last tokens are used.
    """
    if max_positions is not None:
        max_new_tokens = min(max_new_tokens, max_positions // 2)
        prompt_ids = prompt_ids[-(max_positions - max_new_tokens) :]
    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt_ids], device=next(model.parameters()).device)
    if hasattr(model, "generation_config"):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
        )
        completion = output[0, len(prompt_ids) :].tolist()
    else:
        from x_transformers import AutoregressiveWrapper

        wrapper = AutoregressiveWrapper(model)
        options = {"temperature": 0.0, "eos_token": end_ids[0]}
        completion = wrapper.generate(ids, max_new_tokens, **options)[0].tolist()
    model.train(was_training)
    return list(takewhile(lambda id_: id_ not in end_ids, completion))
