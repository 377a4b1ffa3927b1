"""Generate completions with the library that a model comes from."""

from typing import Any

import torch


@torch.no_grad()
def generate(model: Any, prompt_ids: list[int], max_new_tokens: int, eos_id: int) -> list[int]:
    """The greedy completion: each token is the most likely one. The end token is left out."""
    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt_ids], device=next(model.parameters()).device)
    if hasattr(model, "generate"):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )
        completion = output[0, len(prompt_ids) :].tolist()
    else:
        from x_transformers import AutoregressiveWrapper

        wrapper = AutoregressiveWrapper(model)
        completion = wrapper.generate(ids, max_new_tokens, temperature=0.0, eos_token=eos_id)[0].tolist()
    model.train(was_training)
    return completion[: completion.index(eos_id)] if eos_id in completion else completion
