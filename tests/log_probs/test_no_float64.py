"""Devices without float64 (Apple's GPUs): nothing makes it unless the inputs have it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_wrapper import DPO, PreferenceBatch
from dpo_wrapper.log_probs import EXTRAS, FusedLoss, log_probs_from_logits
from dpo_wrapper.losses import BetaDPO, Sigmoid
from helpers.device_waits import DEVICE, DeviceTensor, counted_waits, move_module
from helpers.log_prob_inputs import OPTIONS, random_inputs
from helpers.models import ZOO


class NoFloat64(TorchDispatchMode):
    """Raises where an operation returns float64, on the device that does not exist if `on_device`."""

    def __init__(self, on_device: bool = False) -> None:
        super().__init__()
        self.on_device = on_device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, DeviceTensor if self.on_device else Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func} returned float64, which the device does not have")
        return result


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gather(options: dict, dtype: torch.dtype):
    groups = torch.arange(13) // 4
    for needs_grad in ((True, True, True), (True, False, False)):
        for fused_loss in (None, FusedLoss(torch.sum, groups)):
            inputs = random_inputs(13, 45, 12, dtype, needs_grad=needs_grad)
            with NoFloat64():
                inputs.scores(impl="chunked", fused_loss=fused_loss, **options).sum().backward()
                inputs.scores(impl="chunked", extras=EXTRAS, **options)
    logits = torch.randn(4, 9, 11, dtype=dtype).requires_grad_()
    with NoFloat64():
        log_probs_from_logits(logits, torch.randint(0, 11, (4, 9)), torch.rand(4, 9) < 0.5).sum().backward()


@pytest.mark.parametrize("loss", (Sigmoid(), BetaDPO()), ids=("sigmoid", "beta"))
def test_a_step_after_the_first(loss: Any):
    lists = ([[1, 2], [3, 4]], [[5, 6], [7]], [[8], [9, 10, 11]])
    columns = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    dpo = DPO(ZOO["hf-llama"](0), loss=loss, log_prob_impl="chunked")
    batch = PreferenceBatch.from_lists(*lists, *((None, None) if isinstance(loss, BetaDPO) else columns))
    with counted_waits():
        move_module(dpo)
        batch = batch.to(DEVICE)
        dpo(batch)
        with NoFloat64(on_device=True):
            result, _ = dpo(batch, return_metrics=True)
            result.backward()
