"""`run.sh` to its end, at sizes that measure nothing, and what it does where a stage fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        ["bash", str(HERE / "run.sh"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path} | environment,
    )


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_all_stages(tmp_path):
    done = run("--toy", str(tmp_path / "out"))
    out = tmp_path / "out"
    assert done.returncode == 0 and not done.stderr, done.stderr
    stages = ("tests", "gather", "step", "profile")
    logs = {stage: (out / f"{stage}.log").read_text() for stage in stages}
    summary = read(out, "summary")
    assert list(summary["stages"]) == list(stages)
    assert {"torch", "trl"} <= set(summary["machine"]["versions"])
    for stage, record in summary["stages"].items():
        assert record["status"] == 0, logs[stage]
        assert 0 <= record["seconds"] <= record["limit"] <= 420
    tests = summary["stages"]["tests"]
    assert tests["counts"]["passed"] >= 10 and "failed" not in tests["counts"]
    assert all(test["reason"] for test in tests["tests"].values() if test["outcome"] == "skipped")

    (of_shape,) = read(out, "gather")["shapes"]
    for mode in ("frozen", "trained"):
        figures = of_shape["results"]["fused"]["modes"][mode]
        assert figures["seconds"] > 0 and figures["log_prob_error"] < 1e-3 and figures["grad_error"] < 1e-3
    assert of_shape["results"]["cce"] == {"missing": "needs CUDA"}

    full, lora = read(out, "step")["cases"]
    for case in (full, lora):
        tree, packed = case["results"]["tree"], case["results"]["packed"]
        assert tree["seconds"] > 0 and tree["mfu"] > 0
        assert case["tokens"]["unique"] < case["tokens"]["real"] < case["tokens"]["padded"]
        assert packed["loss"] == pytest.approx(tree["loss"], rel=1e-2)
        if "seconds" in case["results"]["trl"]:  # it is installed
            assert case["results"]["trl"]["loss"] == pytest.approx(tree["loss"], rel=1e-3)
    assert lora["trained"] < full["trained"]
    assert lora["step_flops"]["attention"] == full["step_flops"]["attention"]

    for case in read(out, "profile")["cases"]:
        assert case["busy_ms"] > 0 and case["kernels"] and case["waits"] and case["gaps"]
        assert sum(kernel["share"] for kernel in case["kernels"]) <= 1 + 1e-6
        assert any("dpo_wrapper/" in place["place"] for place in case["places"])


def run_with_stub(folder: Path, *arguments: str, **responses: str) -> tuple[str, list[str]]:
    """What it prints, and the commands, if Python does nothing but, for a command with a name, `response`."""
    folder.mkdir()
    commands = folder / "commands"
    cases = [f"*{name}) {response} ;;" for name, response in responses.items()]
    lines = [
        "#!/bin/sh",
        f'echo "$@" >> {commands}',
        f'case "$1" in *summary.py) exec {sys.executable} "$@" ;; esac',
        'case "$*" in',
        *cases,
        "esac",
    ]
    (folder / "python3").write_text("\n".join(lines) + "\n")
    (folder / "python3").chmod(0o755)
    done = run(*arguments, PATH=f"{folder}:{os.environ['PATH']}")
    assert not done.stderr, done.stderr
    return done.stdout, [line for line in commands.read_text().splitlines() if "summary.py" not in line]


def test_a_failing_stage_does_not_stop_the_next(tmp_path):
    out = tmp_path / "out"
    responses = {"gather.py*": "echo broken; exit 3"}
    printed, _ = run_with_stub(tmp_path / "bin", "--toy", str(out), "gather", "step", **responses)
    assert "gather: exit status 3" in printed and "step: exit status 0" in printed
    assert (out / "gather.log").read_text() == "broken\n"
    assert [stage["status"] for stage in read(out, "summary")["stages"].values()] == [3, 0]


def test_the_tests_of_a_gpu_run_in_three_processes(tmp_path):
    """All files with such tests are in one of them, and a failure of any is one of the stage."""
    out = tmp_path / "out"
    responses = {"test_triton_tile.py": "echo failed; exit 1"}
    printed, commands = run_with_stub(tmp_path / "bin", str(out), "tests", **responses)
    assert "tests: exit status 1" in printed and "failed" in (out / "tests.log").read_text()
    assert len(commands) == 3 and all(" -m cuda " in command for command in commands)
    files = [word for command in commands for word in command.split() if word.startswith("tests/")]
    assert len(files) == len(set(files))
    is_marked = re.compile(r"^@pytest\.mark\.cuda", re.MULTILINE).search
    marked = [file for file in HERE.parent.rglob("test_*.py") if is_marked(file.read_text())]
    assert {str(file.relative_to(HERE.parents[1])) for file in marked} <= set(files)
    names = ("references", "mixed_precision", "device_map")
    assert {f"tests/gpu/test_{name}.py" for name in names} <= set(files)


def test_options_go_to_the_scripts(tmp_path):
    arguments = ("--peak-flops", "312e12", str(tmp_path / "out"), "gather", "step")
    _, (gather, step) = run_with_stub(tmp_path / "bin", *arguments)
    assert step.endswith("--peak-flops 312e12") and "--peak-flops" not in gather
    match = re.search(r"--seconds (\d+) ?", gather)
    assert match is not None
    seconds = int(match[1])  # seven tenths of the 250 until its end, less what the start took
    assert 150 <= seconds <= 175


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage: "),
        (("--help",), "usage: "),
        (("--toy",), "usage: "),
        (("out", "steps"), "a stage should be one of tests gather step profile, but it is steps."),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    done = run(*(str(tmp_path / a) if a == "out" else a for a in arguments))
    assert done.returncode == 2 and message in done.stderr
