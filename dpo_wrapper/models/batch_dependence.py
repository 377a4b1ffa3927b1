"""Models whose log-probs of a sequence depend on the batch that it stands in."""

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

LENGTHS = ("original_max_position_embeddings", "max_position_embeddings")


def max_independent_length(model: nn.Module) -> float:
    """Length of the longest batch, in tokens, in which log-probs of a sequence depend on nothing beside it.

    Infinite for most models. Rotary frequencies of `longrope` and dynamic NTK depend on the longest sequence
    of the batch beyond the length of pretraining; Lily's adapters mix experts by a mean over the whole batch.
    """
    limits = [math.inf]
    for module in model.modules():
        if type(module).__module__.startswith("peft.tuners.lily."):
            limits.append(0)
    configs: dict[int, Any] = {
        id(config): config for m in model.modules() if (config := vars(m).get("config"))
    }
    for config in configs.values():
        if hasattr(config, "to_dict"):
            limits.extend(iterate_limits(config.to_dict(), {}))
    return min(limits)


def iterate_limits(config: dict[str, Any], outer: dict[str, Any]) -> Iterator[float]:
    """The limits that a config and those nested in it set; `outer` holds lengths that apply inside it."""
    inherited = outer | {name: config[name] for name in LENGTHS if isinstance(config.get(name), int)}
    rope_type = config.get("rope_type", config.get("type"))
    if rope_type in ("longrope", "su") or "dynamic" in str(rope_type):
        yield min(inherited.values(), default=0)
    if config.get("use_dynamic_ntk"):  # Qwen's first generation
        yield config.get("seq_length", 0)
    if isinstance(config.get("keep_window_size"), int):  # Doge's attention chooses keys beyond its window
        yield config["keep_window_size"]
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config":
            yield from iterate_limits(value, inherited)
