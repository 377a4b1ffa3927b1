"""The dtypes that the gather computes in."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmaxes, sums and losses: float32, or float64 where `dtype` is float64."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else the wider one of the two tensors'."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device)
    return dtype
