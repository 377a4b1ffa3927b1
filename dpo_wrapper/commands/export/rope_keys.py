"""Rotary positions in a config.json, where programs other than transformers 5 read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GENERATION_FILE = "generation_config.json"
LONG_ROPE = ("longrope", "su")


def lacks_rope_keys(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json names its rotary positions where transformers 5 alone reads them."""
    return any(name not in settings for name in list_rope_keys(settings))


def list_rope_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that older programs and mlx-lm read at the top of a config.json; empty without such positions.

    transformers 5 has them in `rope_parameters` alone, in Gemma 3 once for each type of layer. mlx-lm would
    take its own defaults, such as a theta of 10,000.
    """
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    keys: dict[str, Any] = {}
    if isinstance(sliding := rope.get("sliding_attention"), dict) and "full_attention" in rope:
        rope = rope["full_attention"]
        keys["rope_local_base_freq"] = sliding["rope_theta"]
        if "_sliding_window_pattern" in settings:
            keys["sliding_window_pattern"] = settings["_sliding_window_pattern"]
    if "rope_theta" not in rope:
        return {}
    keys["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {name: value for name, value in rope.items() if name not in keys}
    return keys


def read_config(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def repeat_rope_keys(file: Path) -> None:
    """Write `rope_theta` and the like at the top of a config.json too; transformers reads it as before."""
    settings = read_config(file)
    settings |= list_rope_keys(settings)
    if isinstance(part := settings.get("text_config"), dict):  # of a model that reads images too
        part |= list_rope_keys(part)
    text = json.dumps(settings, indent=2)
    file.write_text(text + "\n", encoding="utf-8")
