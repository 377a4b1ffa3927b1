"""The benchmarks run, at sizes at which they measure nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.forked_scripts import ForkedCommand

BENCHMARKS = Path(__file__).parent / "benchmarks"


def run(script: str, options: str, into: Path, status: int = 0) -> tuple[str, dict[str, Any]]:
    """What it prints, and its JSON."""
    words = [*options.split(), "--runs", "1", "--threads", "1", "--json", into]
    command = ForkedCommand(into.parent / "printed", into.parent, BENCHMARKS / script, *words)
    assert command.status == status and "Traceback" not in command.errors, command.printed
    return command.output, json.loads(into.read_text())


@pytest.mark.slow
def test_log_probs(tmp_path):
    options = "--device cpu --shape 24 16 300 --only chunked eager triton"
    printed, written = run("log_probs.py", options, tmp_path / "log_probs.json", status=1)
    (of_shape,) = written["shapes"]
    assert of_shape["shape"] == [24, 16, 300]
    for name in ("chunked", "eager"):
        modes = of_shape["results"][name]["modes"]
        assert list(modes) == ["forward", "frozen", "trained"]
        for mode, figures in modes.items():
            assert figures["seconds"] > 0 and figures["log_prob_error"] < 1e-3
            assert figures["log_prob_error_nats"] < 1e-5
            assert mode == "forward" or figures["grad_error"] < 1e-3
        # one, two and three products of 2 * 24 * 16 * 300 FLOPs
        flops = [round(m["floor_seconds"] * m["gemm_rate"]) for m in modes.values()]
        assert flops == [230_400, 460_800, 691_200]
    assert printed.count("failed: ") == 3  # on the CPU triton has no line with figures, but it has one


@pytest.mark.slow
def test_step(tmp_path):
    options = "--model xt --dim 64 --depth 1 --vocab 64 --pairs 2 --only tree"
    printed, written = run("step.py", options, tmp_path / "step.json")
    assert written["results"]["tree"]["seconds"] > 0
    assert written["floor"]["product_rate"] > 0
    assert "dpo_wrapper.cpu_matmul.matmul" in printed


@pytest.mark.slow
def test_prepare(tmp_path):
    options = "--rows 60 --words 8 --vocab 400"
    printed, written = run("prepare.py", options, tmp_path / "prepare.json")
    results = written["results"]
    assert results["tokens"] > 60 * 16 and results["share_of_tokenizer"] > 0
    assert results["peak_bytes"][0] > 2**20 and results["reading"]["pairs_per_second"] > 0
    assert "60 rows" in printed


@pytest.mark.slow
def test_lower_layers(tmp_path):
    options = "--dim 64 --depth 3 --vocab 64 --pairs 2"
    printed, written = run("lower_layers.py", options, tmp_path / "lower_layers.json")
    once, whole = (written["results"][name] for name in ("once", "whole"))
    assert once["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-5)
    assert "1 of 3 layers adapted" in printed and "the ratio is 0.71" in printed


@pytest.mark.slow
def test_loop(tmp_path):
    printed, written = run("loop.py", "--pairs 4", tmp_path / "loop.json")
    (figures,) = written["results"].values()
    assert figures["steps"] == 1 and figures["bare"] > 0 and figures["loop"] > 0
    assert len(written["seconds"]["bare"]) == 3 and "overhead" in printed
