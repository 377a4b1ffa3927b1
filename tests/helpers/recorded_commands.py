"""Shell scripts of examples/ with a command in place of `dpo-wrapper` that writes down what it should do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from helpers.examples import EXAMPLES

COMMAND = """#!{python}
import json, os, sys
from pathlib import Path

with open("commands", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
out = Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else None
if os.environ.get("FAILS") in (sys.argv[1], str(out)):
    sys.exit(1)
if sys.argv[1] == "pairs":
    out.write_text("")
elif sys.argv[1] == "train":
    out.mkdir()
    (out / "run.json").write_text('{{"status": "finished"}}')
"""

RunScript = Callable[..., tuple[int, list[list[str]]]]


def record_commands(folder: Path) -> RunScript:
    """What runs a script with arguments in a folder; returns its status, and the commands that it has run.

    The command fails whose name or --out is `fails`.
    """
    command = folder / "bin" / "dpo-wrapper"
    command.parent.mkdir()
    command.write_text(COMMAND.format(python=sys.executable))
    command.chmod(0o755)

    def run_script(name: str, *arguments: str, fails: str = "") -> tuple[int, list[list[str]]]:
        path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
        script = ["sh", str(EXAMPLES / name), *arguments]
        done = subprocess.run(script, cwd=folder, env=os.environ | {"PATH": path, "FAILS": fails})
        lines = (folder / "commands").read_text().splitlines()
        (folder / "commands").unlink()
        return done.returncode, [json.loads(line) for line in lines]

    return run_script
