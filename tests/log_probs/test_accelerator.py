"""The gather on an accelerator, on paper: products, passes over tiles, launches and memory at real shapes."""

from unittest.mock import patch

import pytest
import torch

from dpo_wrapper.log_probs import softmax_cache
from helpers.paper_gpu import run_gather

pytest.importorskip("triton")

GIGABYTE, GIBIBYTE = 10**9, 2**30
# tokens, width, vocabulary: of Llama 3, of Qwen 2.5, and one whose head alone is a gigabyte
LLAMA, QWEN, LARGE = (8192, 2048, 128256), (16384, 896, 151936), (16384, 2048, 248320)


def tiles_of(shape: tuple[int, int, int]) -> int:
    t, _, v = shape
    return -(-t // 8192) * -(-v // 8192)


@pytest.mark.parametrize("shape", (LLAMA, QWEN, LARGE), ids=str)
def test_a_frozen_head(shape: tuple[int, int, int]):
    seen = run_gather(*shape, 60 * GIBIBYTE, trains_head=False)
    assert seen["products"] == (2, 0)
    # each tile is read once and overwritten once; sums are rescaled by a kernel that reads what changes
    tiles = tiles_of(shape)
    assert seen["kernels"] == {"read and write": tiles, "scale": tiles - (2 if shape != LLAMA else 1)}
    assert seen["launches"].total() < 2 * tiles + 60
    assert seen["extra"] < 0.45 * GIGABYTE


@pytest.mark.parametrize("shape", (LLAMA, QWEN, LARGE), ids=str)
def test_a_trained_head_with_little_memory_free(shape: tuple[int, int, int]):
    seen = run_gather(*shape, GIBIBYTE)
    assert seen["products"] == (1, 3)
    assert seen["kernels"] == {"read": tiles_of(shape), "read and write": tiles_of(shape)}
    assert seen["extra"] < 0.45 * GIGABYTE


def test_all_tiles_are_kept_where_they_fit():
    seen = run_gather(*LLAMA, 60 * GIBIBYTE)
    assert seen["products"] == (1, 2)
    assert seen["kernels"] == {"read": 16, "read and write": 16}
    assert seen["extra"] < 8192 * 128256 * 2 + 0.3 * GIGABYTE


def test_no_tile_is_kept_where_they_do_not_fit():
    seen = run_gather(*LARGE, 60 * GIBIBYTE)
    assert seen["products"] == (1, 3) and seen["extra"] < GIGABYTE


@pytest.mark.parametrize("free", (GIBIBYTE, 60 * GIBIBYTE))
@pytest.mark.parametrize("shape", (LLAMA, QWEN), ids=str)
def test_gradients_of_a_bfloat16_head_are_computed_in_forward(shape: tuple[int, int, int], free: int):
    seen = run_gather(*shape, free, groups=64)
    assert seen["products"] == ((3, 0) if free > GIBIBYTE else (1, 3))
    assert seen["extra"] < (2.4 if free > GIBIBYTE else 0.5) * GIGABYTE


def test_the_large_head_takes_less_than_a_gigabyte_beside_its_gradient():
    for free in (GIBIBYTE, 60 * GIBIBYTE):
        assert run_gather(*LARGE, free, groups=64)["extra"] < GIGABYTE


@pytest.mark.parametrize("options", ({}, {"groups": 64}, {"trains_head": False}), ids=str)
def test_a_float32_head_under_autocast_is_cast_once_in_a_pass(options: dict):
    shape = (16384, 256, 32768)
    casts, make = [], torch.Tensor.to

    def to(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        result = make(x, *args, **kwargs)
        if result is not x and x.untyped_storage().nbytes() == 4 * shape[1] * shape[2]:
            casts.append(x.shape[0])
        return result

    with patch.object(torch.Tensor, "to", to):
        seen = run_gather(*shape, GIBIBYTE, dtype=torch.float32, autocast_dtype=torch.bfloat16, **options)
    passes = 2 if sum(seen["products"]) == 4 else 1
    assert sum(casts) <= passes * shape[2], casts


@pytest.mark.parametrize("t", (1, 100, 2048, 8192, 20000))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_tiles_are_as_wide_as_a_program_holds(t: int, dtype: torch.dtype):
    seen = run_gather(t, 64, 100000, GIBIBYTE, dtype=dtype)
    width = min(8192, 128 * 2**20 // (dtype.itemsize * min(t, 8192)))
    assert seen["kernels"]["read"] <= -(-t // 8192) * (-(-100000 // width) + 1)


def test_room_follows_the_memory_of_the_device():
    weight = torch.empty(128256, 2048, dtype=torch.bfloat16, device="meta")
    for free, room in ((0, 64 * 2**20), (4 * GIBIBYTE, GIBIBYTE), (60 * GIBIBYTE, 2 * GIBIBYTE)):
        with patch.object(softmax_cache, "free_bytes", lambda device, free=free: free):
            assert softmax_cache.cache_room(weight) == room


def test_free_memory_is_what_the_device_and_torch_have_left():
    device = torch.device("cuda", 1)
    with (
        patch("torch.cuda.mem_get_info", lambda asked: (5000 if asked == device else 0, 9000)),
        patch("torch.cuda.memory_reserved", lambda asked: 700 if asked == device else 0),
        patch("torch.cuda.memory_allocated", lambda asked: 300 if asked == device else 0),
    ):
        assert softmax_cache.free_bytes(device) == 5400
