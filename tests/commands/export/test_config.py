"""Options of export that cannot be, or contradict each other, and that each of them is read."""

from pathlib import Path

import pytest

from dpo_wrapper.commands.export.config import ExportConfig


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"to": ()}, "^--to should name at least one format, but it names none: give one"),
        ({"to": ("peft", "peft")}, "^--to should name each format once, but it is peft peft"),
        ({"prompts": ()}, "^--prompts should hold texts, but one is empty"),
        ({"prompts": ("a", " ")}, "^--prompts should hold texts, but one is empty"),
        ({"num_tokens": 0}, "^--num-tokens should be at least 1, but it is 0: give another value"),
        ({"quantize": "q8_0"}, "^--quantize should be given with --to gguf or ollama, but --to is merged"),
        ({"adapter": True}, "^--adapter should be given with --to gguf or ollama, but --to is merged"),
        (
            {"to": ("peft", "mlx"), "dtype": "float16"},
            "^--dtype should be given with --to merged or gguf or ollama, but --to is peft mlx: leave it out",
        ),
        (
            {"to": ("gguf",), "adapter": True, "quantize": "q8_0"},
            "^--quantize should be left out where the adapter is exported alone, but it is q8_0",
        ),
        (
            {"to": ("gguf",), "adapter": True, "dtype": "float16"},
            "^--dtype should be given with --to merged, but --to is gguf: leave it out",
        ),
        ({"to": ("gguf",), "base": Path("b.gguf")}, "^--base should be given with --adapter, but that is"),
    ],
)
def test_options_that_cannot_be_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        ExportConfig(**({"model": "m", "to": ("merged",), "out": Path("out")} | options))
