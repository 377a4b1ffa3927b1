"""A judge for the bundled tasks, as `dpo-wrapper pairs --judge examples/answer_key.py:score` takes it.

It knows the right answers. Where nobody does, such a function looks for what makes an answer good.
"""

import json
from pathlib import Path

ROWS = Path(__file__).parent / "data" / "preferences.jsonl"
RIGHT = {row["prompt"]: row["chosen"] for row in map(json.loads, ROWS.open(encoding="utf-8"))}


def score(prompt: str, answer: str) -> float:
    """2 for the right answer, 1 for one that holds it among other words, 0 for others."""
    right = RIGHT[prompt]
    return 2.0 if answer == right else float(right in answer)
