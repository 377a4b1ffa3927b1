"""Add a stage of run.sh to OUT/summary.json: its exit status, seconds and, of tests, their outcomes."""

import argparse
import json
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "x-transformers", "accelerate")
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "peft")
"""Whose absence leaves lines out of the tables."""


def describe_machine() -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in (*PACKAGES, *PEERS):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    gpus = run_tool("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "gpus": gpus.splitlines(),
        "commit": run_tool("git", "rev-parse", "--short", "HEAD"),
        "versions": versions,
        "missing_peers": [name for name in PEERS if versions[name] is None],
    }


def run_tool(*command: str) -> str:
    """What a command prints; nothing if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def read_outcomes(files: list[Path]) -> dict[str, Any]:
    tests: dict[str, dict[str, Any]] = {}
    for file in files:
        if file.exists():
            tests |= json.loads(file.read_text())
    counts = Counter(test["outcome"] for test in tests.values())
    return {"counts": dict(counts), "tests": tests}


def describe_stage(args: argparse.Namespace) -> dict[str, Any]:
    record: dict[str, Any] = {
        "status": args.status,
        "timed_out": args.status in (124, 137),
        "seconds": args.seconds,
        "limit": args.limit,
    }
    if args.stage == "tests":
        return record | read_outcomes(args.outcomes)
    file = args.out / f"{args.stage}.json"
    return record | {"results": file.name if file.exists() else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--outcomes", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    file = args.out / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {"machine": describe_machine(), "stages": {}}
    stage = summary["stages"][args.stage] = describe_stage(args)
    file.write_text(json.dumps(summary, indent=1) + "\n")
    end = " (its time was up)" if stage["timed_out"] else ""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in stage.get("counts", {}).items())
    times = f"{args.seconds} of {args.limit} s"
    print(f"{args.stage}: exit status {args.status}{end}, {times}  {counts}".rstrip())
    if len(summary["stages"]) == 1 and summary["machine"]["missing_peers"]:
        print(f"not installed, so left out: {', '.join(summary['machine']['missing_peers'])}")


if __name__ == "__main__":
    main()
