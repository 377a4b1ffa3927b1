"""The peak memory that `token_log_probs` needs, as the system measures it in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dpo_wrapper.log_probs.fused_backward import max_chunk_tokens
from dpo_wrapper.log_probs.softmax_cache import cache_room
from dpo_wrapper.log_probs.tiles import TILE_BYTES

TESTS = Path(__file__).parents[1]
MEBIBYTE = 2**20
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@pytest.fixture(scope="module")
def measure_extra() -> Iterator[Callable[[str, int, int, int], int]]:
    """How many bytes forward and backward need beyond their inputs, for a mode and the sizes t, d and v."""
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, str(TESTS / "helpers" / "log_prob_memory.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    ) as process:

        def measure(*case: str | int) -> int:
            print(*case, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())["extra"]

        yield measure


# all logits are 128, 128 and 256 MiB: far more than what is allowed where they are not cached
@pytest.mark.pitfall(18)
@pytest.mark.parametrize("t, d, v", ((512, 64, 65536), (2048, 128, 16384), (8192, 32, 8192)))
@pytest.mark.parametrize("mode", ("cached", "recomputed", "frozen", "default"))
def test_beside_inputs_and_gradients_there_are_a_few_tiles(mode: str, t: int, d: int, v: int, measure_extra):
    grad_bytes = (t * d + (0 if mode == "frozen" else v * d)) * 4
    logits, hidden_grad = t * v * 4, t * d * 4
    # a tile, and on some processors another one by the matrix library
    allowed = grad_bytes + 2 * TILE_BYTES["cpu"] + 2 * hidden_grad + 8 * MEBIBYTE
    extra = measure_extra(mode, t, d, v)
    if mode == "cached":
        assert logits < extra < logits + allowed
    elif mode == "default":
        budget = min(logits, cache_room(torch.empty(v, d)))
        assert budget // 2 < extra < budget + allowed
    else:
        assert grad_bytes < extra < allowed < logits


@pytest.mark.parametrize("t, d, v", ((2048, 64, 16384), (1536, 512, 32768), (8192, 32, 8192)))
def test_a_fused_loss_needs_the_softmaxes_of_one_chunk(t: int, d: int, v: int, measure_extra):
    logits, grad_bytes = t * v * 4, (t * d + v * d) * 4
    max_tokens = max_chunk_tokens(torch.empty(v, d), torch.float32)
    chunk = max(max_tokens, t // 8) * v * 4  # a group may exceed a chunk
    other = 2 * TILE_BYTES["cpu"] + 3 * t * d * 4 + 8 * MEBIBYTE
    extra = measure_extra("fused", t, d, v)
    assert grad_bytes + chunk // 2 < extra < grad_bytes + chunk + other < grad_bytes + logits


def test_a_group_larger_than_a_chunk_needs_no_more_than_cached_softmaxes(measure_extra):
    t, d, v = 1152, 128, 65536
    assert measure_extra("uneven", t, d, v) < measure_extra("default", t, d, v) + 2 * TILE_BYTES["cpu"]


def test_the_gradient_of_the_head_takes_the_place_of_cached_softmaxes(measure_extra):
    t, d, v = 1024, 256, 65536
    logits, gradient = t * v * 4, v * d * 4
    # a quarter of the gradient exists when the first of four buffers is freed
    allowed = logits + gradient // 2 + TILE_BYTES["cpu"] + 3 * t * d * 4 + 8 * MEBIBYTE
    assert logits < measure_extra("default", t, d, v) < allowed < logits + gradient


def test_eager_holds_all_logits(measure_extra):  # the measurement shows it
    t, d, v = 2048, 128, 16384
    assert measure_extra("eager", t, d, v) > 2 * t * v * 4
