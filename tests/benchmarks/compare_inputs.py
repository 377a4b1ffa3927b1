"""What the cases of `compare_checkouts.py` share: names that are looked up, and inputs with fixed seeds."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from compare_models import VOCAB
from torch import Tensor, nn

OLD_NAMES = {
    "cache_ref_log_probs": "remember_reference",
    "fused_loss": "ahead",
    "sft_learning_rate": "sft_lr",
    "learning_rate": "lr",
    "micro_batch_tokens": "max_tokens",
    "save_steps": "save_every",
    "precompute_ref_log_probs": "precompute_reference",
}
Tensors = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Tensors]]]
PADDINGS = ("right", "left", "middle")


# names


def find(*names: str) -> Any:
    """The first of these dotted names that the checkout has."""
    for name in names:
        path, _, attribute = f"dpo_wrapper.{name}".rpartition(".")
        try:
            return getattr(importlib.import_module(path), attribute)
        except ModuleNotFoundError as error:
            if not path.startswith(str(error.name)):
                raise
        except AttributeError:
            pass
    raise AttributeError(f"dpo_wrapper has none of {', '.join(names)}.")


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with today's keywords, or with the old ones if it does not know today's."""
    known = inspect.signature(function).parameters
    return function(*args, **{k if k in known else OLD_NAMES.get(k, k): v for k, v in kwargs.items()})


def method(instance: object, *names: str) -> Any:
    return next(getattr(instance, name) for name in names if hasattr(instance, name))


# inputs


def make_pairs(padding: str = "right", seed: int = 0) -> dict[str, Any]:
    """Four padded pairs, two of which share a prompt, as keywords of `DPO.forward`."""
    generator = torch.Generator().manual_seed(seed)
    b, n, prompt = 4, 14, 5
    ids = torch.randint(1, VOCAB, (2, b, n), generator=generator)
    ids[:, 1, :prompt] = ids[:, 0, :prompt]
    ids[1, :, :prompt] = ids[0, :, :prompt]
    lengths = torch.tensor([[14, 9, 11, 7], [8, 12, 11, 13]])
    cut = {"right": n, "left": 0, "middle": 3}[padding]  # where the padding begins
    position = torch.arange(n)
    order = position - (n - lengths[..., None]) * (position >= cut)
    reals = (order < lengths[..., None]) & ((position < cut) | (order >= cut))
    ids, prompts = (t.gather(-1, order.clamp(min=0)) for t in (ids, (position < prompt).expand(2, b, n)))
    ids, prompts = ids.where(reals, 0), prompts & reals
    return dict(
        preferred_seq=ids[0], unpreferred_seq=ids[1], prompt_mask=tuple(prompts), seq_mask=tuple(reals)
    )


def make_lists(count: int, seed: int, low: int = 2, high: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 1) -> None:
    """Move the policy away from its reference."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def gradients(*tensors: Tensor) -> Tensor:
    """All gradients in one vector, NaN where there is none."""
    filled = [t.new_full(t.shape, torch.nan) if t.grad is None else t.grad for t in tensors]
    return torch.cat([t.detach().flatten().double() for t in filled])
