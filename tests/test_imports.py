"""The import rules of docs/architecture.md: which part of the package may import which, and when."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dpo_wrapper"

LEAVES = "tensor_dataclass libraries cpu_matmul display version"
"""These import nothing of ours but one another, and every other part may import them."""

CORE = "losses log_probs prefix_tree models batches scoring reference metrics"

ALLOWED = {
    "tensor_dataclass": "",
    "libraries": "",
    "cpu_matmul": "",
    "version": "",
    "display": "",
    "validation": "",
    # 1. these import nothing of each other
    "losses": "",
    "log_probs": "",
    "prefix_tree": "",
    # 2. from a batch to log-probs, of the policy and of a reference
    "models": "validation prefix_tree",
    "batches": "validation prefix_tree losses.inputs",
    "scoring": "validation prefix_tree models batches log_probs",
    "reference": "validation models batches scoring",
    # 3. the module, and metrics of its batches
    "metrics": "batches losses",
    "dpo": f"validation {CORE}",
    # 4. files and models by name
    "data": "validation batches",
    "pretrained": "validation models data.tokens.tokenizers",
    # 5. commands
    "training": f"validation {CORE} dpo data pretrained evaluation",
    "evaluation": "dpo data metrics models.eval_mode batches losses pretrained reference scoring.rounding",
    "commands": f"validation {CORE} dpo data pretrained training evaluation",
    "export": "pretrained",
    "cli": "data.prepare data.prepared data.preview training commands export",
    "__main__": "cli",
    "__init__": f"{CORE} dpo data",
}
"""What each module or package at the top may import, beside itself and the leaves."""

ONLY_HERE = {"data": ("batches", "data/collate.py")}
"""Of `data`, one file alone imports batches."""

OPTIONAL = "transformers peft accelerate datasets pyarrow safetensors tokenizers matplotlib tqdm tyro triton"
MAY_NEED_OPTIONAL = ("training/", "commands/", "cli.py", "log_probs/triton_tile.py")
"""Files that may import an optional library at the top: they themselves are imported inside functions."""


def name_of(path: Path) -> str:
    """A file as a module: `losses/base.py` of the package is `dpo_wrapper.losses.base`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MODULES = {name_of(path) for path in FILES}


def imports_of(nodes: Iterator[ast.AST], path: Path) -> Iterator[str]:
    """Full names of the modules that import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else str(node.module)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_within(module: str, allowed: str) -> bool:
    return f"{module}.".startswith(f"{PACKAGE}.{allowed}.")


def test_every_part_has_a_rule():
    parts = {path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert parts - ALLOWED.keys() == set()


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_what_it_may(part):
    allowed = [part, *LEAVES.split(), *ALLOWED[part].split()]
    file, folder = ROOT / PACKAGE / f"{part}.py", ROOT / PACKAGE / part
    refused = set()
    for path in (file, *sorted(folder.rglob("*.py"))):
        if not path.is_file():
            continue
        for module in imports_of(ast.walk(parsed(path)), path):
            if module.split(".")[0] == PACKAGE and not any(is_within(module, other) for other in allowed):
                refused.add(f"{path.relative_to(ROOT / PACKAGE)} imports {module}")
    assert not refused


@pytest.mark.parametrize("part", ONLY_HERE)
def test_a_part_imports_another_in_one_file_alone(part):
    other, only = ONLY_HERE[part]
    found = {
        path.relative_to(ROOT / PACKAGE).as_posix()
        for path in (ROOT / PACKAGE / part).rglob("*.py")
        for module in imports_of(ast.walk(parsed(path)), path)
        if is_within(module, other)
    }
    assert found <= {only}


def test_the_command_line_imports_commands_where_it_runs_them():
    path = ROOT / PACKAGE / "cli.py"
    at_the_top = {name for name in imports_of(iter(parsed(path).body), path) if name.split(".")[0] == PACKAGE}
    assert at_the_top == {"dpo_wrapper.version"}


def test_optional_libraries_are_imported_where_they_are_used():
    found = [
        f"{path.relative_to(ROOT / PACKAGE)} imports {module}"
        for path in FILES
        if not path.relative_to(ROOT / PACKAGE).as_posix().startswith(MAY_NEED_OPTIONAL)
        for module in imports_of(iter(parsed(path).body), path)
        if module.split(".")[0] in OPTIONAL.split()
    ]
    assert not found


@pytest.mark.slow
def test_the_package_alone_loads_no_optional_library():
    libraries = [name for name in OPTIONAL.split() if name != "tqdm"]  # which torch loads
    code = f"import sys, {PACKAGE}; print([name for name in {libraries} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_package_loads_torch_when_a_name_is_used():
    code = (
        f"import sys, {PACKAGE}; print('torch' in sys.modules); {PACKAGE}.DPO; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_every_public_name_has_its_module():
    package = importlib.import_module(PACKAGE)
    typed = {
        alias.name
        for node in parsed(ROOT / PACKAGE / "__init__.py").body
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    names = {name for part in package.MODULES.values() for name in part.split()}
    assert names == typed == {*package.__all__} - {"__version__"}
    assert all(getattr(package, name).__module__.startswith(PACKAGE) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'DPOO'"):
        package.DPOO  # noqa: B018
