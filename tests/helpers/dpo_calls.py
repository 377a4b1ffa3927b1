import torch
from torch import Generator, nn

from helpers.batches import Case

LN2 = 0.6931471805599453


def arguments(case: Case) -> dict:
    return {
        "preferred_seq": case.preferred_seq,
        "unpreferred_seq": case.unpreferred_seq,
        "prompt_mask": case.prompt_masks,
        "seq_mask": case.seq_masks,
    }


def on_device(values: dict, device: str) -> dict:
    """The same arguments, tensors or tuples of them, on a device."""
    return {
        name: tuple(t.to(device) for t in value) if isinstance(value, tuple) else value.to(device)
        for name, value in values.items()
    }


def nudged(model: nn.Module, scale: float = 0.02) -> nn.Module:
    """The model a few steps further on, in place."""
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model
