"""docs/pitfalls.md and the tests: each line has a test, and each mark has a line."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def numbers_in(path: Path) -> set[int]:
    """The numbers in all `pytest.mark.pitfall(...)` of a file."""
    return {
        ast.literal_eval(argument)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.pitfall"
        for argument in node.args
    }


def test_every_pitfall_has_a_test_and_every_mark_a_pitfall():
    table = (TESTS.parent / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    listed = [int(number) for number in re.findall(r"^\| (\d+) \|", table, flags=re.MULTILINE)]
    assert listed == list(range(1, 27))
    marked = set().union(*map(numbers_in, TESTS.rglob("test_*.py")))
    assert set(listed) - marked == set(), "pitfalls without a test"
    assert marked - set(listed) == set(), "marks without a pitfall"
