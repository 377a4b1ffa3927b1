"""Compare the numbers of two checkouts of this project, bit for bit.

    python tests/benchmarks/compare_checkouts.py OLD_CHECKOUT [NEW_CHECKOUT] [--only GROUP ...]

Each checkout (the second is by default the one this file is in) is imported in a process of its own, which
computes the cases of `compare_cases.py` with fixed seeds and saves them. The table has one line per group.
The exit status is 1 if anything differs.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from compare_cases import GROUPS
from torch import Tensor

Tensors = dict[str, dict[str, Any]]
"""By group and case, a tensor or the text of an error."""


def record(groups: list[str], file: Path) -> None:
    """Compute every case of some groups; what fails is saved as the error's text."""
    warnings.simplefilter("ignore")
    found: Tensors = {}
    for group in groups:
        found[group] = {}
        for name, compute in GROUPS[group]():
            torch.manual_seed(0)
            try:
                for key, value in compute().items():
                    found[group][f"{name} | {key}"] = torch.as_tensor(value).detach().clone()
            except Exception as error:
                found[group][name] = f"{type(error).__name__}: {error}"
    torch.save(found, file)


def record_checkout(checkout: Path, groups: list[str]) -> Tensors:
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "tensors.pt"
        command = [sys.executable, __file__, str(checkout), "--record", str(file), "--only", *groups]
        run = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{checkout}:\n{run.stderr[-3000:]}")
        return torch.load(file)


def is_equal(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    return torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (old, new)))


def relative_difference(old: Tensor, new: Tensor) -> float:
    """The largest difference over the largest value."""
    if old.shape != new.shape or not torch.equal(old.isnan(), new.isnan()):
        return float("inf")
    old, new = old.double().nan_to_num(0.0), new.double().nan_to_num(0.0)
    return ((old - new).abs().max() / old.abs().max().clamp(min=1e-300)).item()


def compare(old: Tensors, new: Tensors, max_names: int) -> bool:
    """Print the table and the names of what differs; whether nothing does."""
    columns = ("tensors", "equal", "differ", "one side", "errors", "largest difference")
    print(f"{'group':12}" + "".join(f"{name:>{len(name) + 3}}" for name in columns))
    remarks: list[str] = []
    for group in old:
        sides = {"old": old[group], "new": new[group]}
        errors = {
            name: f"fails in the {side}: {value}"
            for side, values in sides.items()
            for name, value in values.items()
            if isinstance(value, str)
        }
        names = [
            name for name in dict.fromkeys([*old[group], *new[group]]) if name.split(" | ")[0] not in errors
        ]
        lonely = {
            name: f"is only in the {side}"
            for side, values in sides.items()
            for name in names
            if name in values and not all(name in others for others in sides.values())
        }
        pairs = {name: (old[group][name], new[group][name]) for name in names if name not in lonely}
        differences = {
            name: relative_difference(*pair) for name, pair in pairs.items() if not is_equal(*pair)
        }
        numbers = [len(names), len(pairs) - len(differences), len(differences), len(lonely), len(errors)]
        cells = [*map(str, numbers), f"{max(differences.values(), default=0.0):.2g}"]
        widths = [len(name) + 3 for name in columns]
        print(f"{group:12}" + "".join(f"{x:>{n}}" for x, n in zip(cells, widths, strict=True)))
        differ = {name: f"differs by {value:.2g}" for name, value in differences.items()}
        for found in (differ, lonely, errors):
            remarks += [f"{group}: {name} {text}" for name, text in list(found.items())[:max_names]]
            remarks += [f"{group}: ... and {len(found) - max_names} more"] * (len(found) > max_names)
    print("\n".join(["", *remarks]) if remarks else "\nNothing differs.")
    return not remarks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=Path(__file__).parents[2])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups to compare")
    parser.add_argument("--max-names", type=int, default=20, help="how many names of a group to print")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record is not None:
        # an editable installation would lend the modules that the checkout does not have
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
        package = Path(str(importlib.import_module("dpo_wrapper").__file__)).resolve()
        assert package.is_relative_to(options.old.resolve()), package
        record(options.only, options.record)
    else:
        checkouts = [options.old.resolve(), options.new.resolve()]
        with ThreadPoolExecutor() as threads:
            old, new = threads.map(lambda checkout: record_checkout(checkout, options.only), checkouts)
        sys.exit(0 if compare(old, new, options.max_names) else 1)


if __name__ == "__main__":
    main()
