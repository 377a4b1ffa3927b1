"""Devices: without float64 (Apple's GPUs), and another than the tensors' as torch's default."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpo_wrapper import DPO
from dpo_wrapper.losses import BetaDPO
from dpo_wrapper.metrics import MetricSums
from helpers.marks import mark_slow_except
from helpers.models import ZOO
from helpers.naive_dpo import ARGUMENTS

CONVERSIONS = (Tensor.double, Tensor.to, Tensor.type)


class WithoutFloat64(TorchFunctionMode):
    """Raises, as an Apple GPU does, where a tensor gets float64 that `.cpu()` has not moved before."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.cpu:
            result = result.view_as(result)
            result.is_on_cpu = True
        is_converted = func in CONVERSIONS and isinstance(result, Tensor) and result.dtype == torch.float64
        if is_converted and args[0].dtype != torch.float64 and not hasattr(args[0], "is_on_cpu"):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_the_check_sees_float64_on_the_device():
    with WithoutFloat64(), pytest.raises(TypeError, match="MPS"):
        torch.ones(2).double()
    with WithoutFloat64():
        assert torch.ones(2).cpu().double().dtype == torch.float64


@pytest.mark.filterwarnings("ignore:all logits", "ignore:prefixes are not shared")
@pytest.mark.parametrize(
    "name, loss",
    mark_slow_except(
        [("xt-rotary", None), ("xt-mixture", None), ("hf-llama", BetaDPO()), ("plain-gru", None)],
        product(["xt-rotary", "xt-mixture", "hf-llama", "hf-gemma2", "plain-gru"], [None, BetaDPO()]),
    ),
)
def test_no_float64_on_the_device(name, loss):
    with WithoutFloat64():
        dpo = DPO(ZOO[name](0), loss=loss)
        loss, metrics = dpo(**ARGUMENTS, return_metrics=True)
        loss.backward()
        sums = MetricSums()
        sums.add(metrics)
        assert sums.result()["loss"] == pytest.approx(loss.item(), rel=1e-6)
        dpo.end_step(lambda tensor: tensor.to(torch.float32))
        with torch.no_grad():
            dpo(**ARGUMENTS)


@pytest.mark.parametrize(
    "name, share_prefix",
    mark_slow_except(
        [("xt-rotary", "auto"), ("hf-llama", False)],
        product(["xt-rotary", "hf-llama", "plain-gru"], ["auto", False]),
    ),
)
def test_another_default_device(name, share_prefix):
    dpo = DPO(ZOO[name](0), share_prefix=share_prefix, cache_ref_log_probs=True)
    expected = DPO(ZOO[name](0))(**ARGUMENTS)
    torch.set_default_device("meta")
    try:
        loss, metrics = dpo(**ARGUMENTS, return_metrics=True)
        loss.backward()
        assert metrics["tokens/padded"] > metrics["tokens/unique"]
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(loss, expected)
