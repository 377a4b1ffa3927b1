"""Logs for `dpo-wrapper pairs` in tests, and their files."""

import json
from typing import Any

PROMPTS = ["ab", "abcdefgh", "a", "abcd", "abc", "abcdefg"]
LOGS: list[dict[str, Any]] = [
    {"prompt": prompt, "completion": f"answer {k}"} for k, prompt in enumerate(PROMPTS)
]
LOGS[2] = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer 2"}],
    "split": "test",
}
NEW_TOKENS = 6


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
