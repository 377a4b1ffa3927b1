"""The errors of `token_log_probs`."""

import math
import sys

import pytest
import torch

from dpo_wrapper import token_log_probs
from dpo_wrapper.log_probs import choose_impl, torch_tile

H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 4])
REFUSED = {
    "hidden-3d": (
        ValueError,
        {"hidden": H[None]},
        "hidden should have 2 dimensions, but its shape is (1, 3, 4).",
    ),
    "hidden-1d": (ValueError, {"hidden": H[0]}, "hidden should have 2 dimensions, but its shape is (4,)."),
    "weight-1d": (ValueError, {"weight": W[0]}, "weight should have 2 dimensions, but its shape is (4,)."),
    "targets-2d": (
        ValueError,
        {"targets": T[None]},
        "targets should have 1 dimensions, but its shape is (1, 3).",
    ),
    "targets-0d": (ValueError, {"targets": T[0]}, "targets should have 1 dimensions, but its shape is ()."),
    "weight-device": (
        ValueError,
        {"weight": W.to("meta")},
        "weight should be on cpu like hidden, but it is on meta: move one of them.",
    ),
    "targets-device": (
        ValueError,
        {"targets": T.to("meta")},
        "targets should be on cpu like hidden, but it is on meta: move one of them.",
    ),
    "hidden-int": (
        TypeError,
        {"hidden": H.long()},
        "hidden and weight should be floats, but they are torch.int64 and torch.float32.",
    ),
    "weight-int": (
        TypeError,
        {"weight": W.int()},
        "hidden and weight should be floats, but they are torch.float32 and torch.int32.",
    ),
    "targets-float": (
        TypeError,
        {"targets": T.float()},
        "targets should be token ids (int64), but they are torch.float32.",
    ),
    "targets-bool": (
        TypeError,
        {"targets": T.bool()},
        "targets should be token ids (int64), but they are torch.bool.",
    ),
    "widths": (
        ValueError,
        {"weight": W[:, :3]},
        "weight should be 4 wide like hidden, but it is 3 wide: take both from the same model.",
    ),
    "lengths": (
        ValueError,
        {"targets": T[:2]},
        "targets should be one for each of 3 hidden states, but there are 2: select both by the same mask.",
    ),
    "no-targets": (
        ValueError,
        {"targets": T[:0]},
        "targets should be one for each of 3 hidden states, but there are 0: select both by the same mask.",
    ),
    "bias-length": (
        ValueError,
        {"bias": torch.zeros(4)},
        "bias should have shape (5,), but its shape is (4,).",
    ),
    "bias-one": (ValueError, {"bias": torch.zeros(1)}, "bias should have shape (5,), but its shape is (1,)."),
    "bias-2d": (
        ValueError,
        {"bias": torch.zeros(5, 1)},
        "bias should have shape (5,), but its shape is (5, 1).",
    ),
    "softcap-zero": (ValueError, {"softcap": 0.0}, "softcap should be positive, but it is 0.0."),
    "softcap-negative": (ValueError, {"softcap": -30.0}, "softcap should be positive, but it is -30.0."),
    "softcap-nan": (ValueError, {"softcap": math.nan}, "softcap should be positive, but it is nan."),
    "target-high": (ValueError, {"targets": T + 1}, "targets should be in [0, 5), but one is 5."),
    "target-low": (ValueError, {"targets": T - 1}, "targets should be in [0, 5), but one is -1."),
    "target-ignored": (  # the -100 that other libraries skip
        ValueError,
        {"targets": torch.tensor([0, -100, 1])},
        "targets should be in [0, 5), but one is -100.",
    ),
    "no-vocabulary": (ValueError, {"weight": W[:0]}, "targets should be in [0, 0), but one is 0."),
    "impl-unknown": (
        ValueError,
        {"impl": "fast"},
        "impl should be one of auto, triton, chunked, eager, but it is 'fast'.",
    ),
    "impl-none": (
        ValueError,
        {"impl": None},
        "impl should be one of auto, triton, chunked, eager, but it is None.",
    ),
    "extras-unknown": (
        ValueError,
        {"extras": ["top1", "top5"]},
        "extras should be a list of names from entropy, log_sum_p2, top1, greedy, "
        "but it is ['top1', 'top5'].",
    ),
    "extras-string": (
        ValueError,
        {"extras": "entropy"},
        "extras should be a list of names from entropy, log_sum_p2, top1, greedy, but it is 'entropy'.",
    ),
}


@pytest.mark.parametrize("name", ("chunked", "eager"))
@pytest.mark.parametrize("kind, change, message", REFUSED.values(), ids=REFUSED)
def test_refusals(name: str, kind: type[Exception], change: dict, message: str):
    with pytest.raises(kind) as caught:
        token_log_probs(**{"hidden": H, "weight": W, "targets": T, "impl": name} | change)
    assert str(caught.value) == message


def test_triton_on_the_cpu_is_refused():
    pytest.importorskip("triton")
    with pytest.raises(ValueError) as caught:
        token_log_probs(H, W, T, impl="triton")
    assert str(caught.value) == (
        "tensors should be on CUDA for impl = 'triton', but they are on cpu: use 'auto'."
    )


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "dpo_wrapper.log_probs.triton_tile", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError) as caught:
        token_log_probs(H, W, T, impl="triton")
    assert str(caught.value) == (
        "triton should be installed for impl = 'triton', but it is not: pip install triton."
    )
    assert choose_impl("auto", torch.device("cuda")) is torch_tile.token_log_probs


MORE_REFUSED = {
    "bias-int": (TypeError, {"bias": torch.zeros(5, dtype=torch.long)}),
    "bias-device": (ValueError, {"bias": torch.zeros(5, device="meta")}),
    "softcap-inf": (ValueError, {"softcap": math.inf}),
    "scale-nan": (ValueError, {"logit_scale": math.nan}),
    "scale-inf": (ValueError, {"logit_scale": math.inf}),
}


@pytest.mark.parametrize("kind, change", MORE_REFUSED.values(), ids=MORE_REFUSED)
def test_more_refusals(kind: type[Exception], change: dict):
    with pytest.raises(kind, match=next(iter(change))) as caught:
        token_log_probs(H, W, T, **change)
    assert "\n" not in str(caught.value)
