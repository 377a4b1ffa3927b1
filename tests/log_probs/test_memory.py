"""The most memory that `token_log_probs` takes, measured by the system in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_wrapper.log_probs import torch_tile as chunked

TESTS = Path(__file__).parents[1]
MEBIBYTE = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def measured(way: str, t: int, d: int, v: int) -> int:
    """Bytes that forward and backward need beyond their inputs."""
    command = [sys.executable, str(TESTS / "helpers" / "log_prob_memory.py"), way, str(t), str(d), str(v)]
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["extra"]


# all logits are 128, 128 and 256 MiB: far more than what is allowed where they are not kept
@pytest.mark.pitfall(18)
@pytest.mark.parametrize("t, d, v", ((512, 64, 65536), (2048, 128, 16384), (8192, 32, 8192)))
@pytest.mark.parametrize("way", ("kept", "again", "frozen", "default"))
def test_beside_inputs_and_gradients_there_are_a_few_tiles(way: str, t: int, d: int, v: int):
    gradients = (t * d + (0 if way == "frozen" else v * d)) * 4
    logits, of_hidden = t * v * 4, t * d * 4
    # a tile, and on some processors the library's own beside it
    allowed = gradients + 2 * chunked.TILE_BYTES["cpu"] + 2 * of_hidden + 8 * MEBIBYTE
    extra = measured(way, t, d, v)
    if way == "kept":
        assert logits < extra < logits + allowed
    elif way == "default":
        room = min(logits, chunked.keep_bytes(torch.empty(v, d)))
        assert room // 2 < extra < room + allowed
    else:
        assert gradients < extra < allowed < logits


@pytest.mark.parametrize("t, d, v", ((2048, 64, 16384), (1536, 512, 32768), (8192, 32, 8192)))
def test_where_the_loss_is_known_a_part_of_the_softmaxes_is_there(t: int, d: int, v: int):
    logits, gradients = t * v * 4, (t * d + v * d) * 4
    part = max(chunked.part_rows(torch.empty(v, d)), t // 8) * v * 4  # a group, if that is more
    beside = 2 * chunked.TILE_BYTES["cpu"] + 3 * t * d * 4 + 8 * MEBIBYTE
    extra = measured("ahead", t, d, v)
    assert gradients + part // 2 < extra < gradients + part + beside < gradients + logits


def test_a_group_that_is_a_part_too_large_costs_no_more_than_softmaxes_that_are_kept():
    t, d, v = 1152, 128, 65536
    assert measured("uneven", t, d, v) < measured("default", t, d, v) + 2 * chunked.TILE_BYTES["cpu"]


def test_the_gradient_of_the_head_takes_the_place_of_kept_softmaxes():
    t, d, v = 1024, 256, 65536
    logits, gradient = t * v * 4, v * d * 4
    # when the first of four stretches is given back, a quarter of the gradient is there
    allowed = logits + gradient // 2 + chunked.TILE_BYTES["cpu"] + 3 * t * d * 4 + 8 * MEBIBYTE
    assert logits < measured("default", t, d, v) < allowed < logits + gradient


def test_eager_holds_all_logits():  # the measure sees it
    t, d, v = 2048, 128, 16384
    assert measured("eager", t, d, v) > 2 * t * v * 4
