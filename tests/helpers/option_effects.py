"""What the options of a run of a tiny model change: what is read before it, and what it leaves."""

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.monitoring.figure import Figure
from dpo_wrapper.training.setup import TrainSetup, set_up_training
from dpo_wrapper.training.train import run_training
from helpers import tokenizers as tiny
from helpers.datasets import write_rows
from helpers.lora_runs import save_llama
from helpers.runs import read_metrics
from helpers.shareable_models import hf

WORDS = ("red", "green and blue", "a", "many", "three words here", "no", "two words", "x")
PAIRS = [
    {"prompt": f"{'ask ' * (k % 3)}{k}?", "chosen": word, "rejected": word[::-1] + " or so" * (1 + k % 2)}
    for k, word in enumerate(WORDS)
]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FILES: dict[str, list[dict[str, Any]]] = {
    "pairs.jsonl": PAIRS,
    "swapped.jsonl": [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS],
    "dialogues.jsonl": [
        {**row, "prompt": [*TURNS, {"role": "user", "content": f"{k}?"}]} for k, row in enumerate(PAIRS)
    ],
    "lists.jsonl": [{"prompt": f"{k}?", "completions": ["a", "bb", "ccc"]} for k in range(8)],
    "empty.jsonl": [*PAIRS, {"prompt": "e", "chosen": "", "rejected": "b"}],
    "broken.jsonl": [*PAIRS, {"prompt": "e", "chosen": "a"}],
}
TEMPLATE = "{{ greeting }}{% for message in messages %}[{{ message.content }}]{% endfor %}"

BASE: dict[str, Any] = {
    "data": "pairs.jsonl", "eval_fraction": 0.25, "max_length": 64, "cpu": True,
    "sft_epochs": 0, "epochs": 1, "batch_size": 3, "learning_rate": 1e-2,
    "save_steps": 0, "samples": 0, "exact_answers": 0,
}  # fmt: skip
"""One epoch of preference training: 2 steps, of 6 pairs; 2 more are evaluated on."""


class Workshop:
    """A folder with data and models, where runs are made, and described once for each choice of options.

    In options, a text that is the name of a file or folder in it stands for its path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_runs = folder, 0
        for name, rows in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_rows(folder / name, rows)
        tiny.save_tokenizer(folder / "chat", eos="<|im_end|>", template=tiny.CHATML)
        (folder / "template.jinja").write_text(TEMPLATE)
        save_llama(folder / "llama")
        mixture = hf("Mixtral", num_local_experts=3, num_experts_per_tok=2, vocab_size=300)
        mixture(0).save_pretrained(folder / "mixture")
        self.run(self.config({"model": "llama", "lora": True, "out": folder / "adapter"}))
        self.describe_setup, self.describe_run = cache(self._describe_setup), cache(self._describe_run)

    def config(self, options: dict[str, Any]) -> TrainConfig:
        self.num_runs += 1
        options = {"out": self.folder / f"run-{self.num_runs}"} | BASE | options
        return TrainConfig(**{name: self.find(value) for name, value in options.items()})

    def find(self, value: Any) -> Any:
        if not isinstance(value, str) or not (self.folder / value).exists():
            return value
        is_text = value in ("llama", "mixture", "chat")  # what may also be a name on the hub
        return str(self.folder / value) if is_text else self.folder / value

    def run(self, config: TrainConfig) -> str:
        """What a run prints; it draws no curves."""
        AcceleratorState._reset_state()  # which would keep the precision of an earlier run
        printed = io.StringIO()
        with redirect_stdout(printed), patch.object(Figure, "draw"):
            run_training(set_up_training(config))
        AcceleratorState._reset_state()
        return printed.getvalue()

    def measure(self, part: str, options: dict[str, Any]) -> Any:
        """A part of what is known of a run with these options."""
        is_of_setup = part in ("setup", "refusal")
        describe = self.describe_setup if is_of_setup else self.describe_run
        known = describe(tuple(options.items()))
        assert part in known, known
        return known[part]

    def _describe_setup(self, options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        try:
            return describe_setup(set_up_training(self.config(dict(options)))) | {"refusal": None}
        except ValueError as error:
            return {"refusal": str(error)}

    def _describe_run(self, options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        config = self.config(dict(options))
        printed = self.run(config)
        return {name: describe(config.out, printed) for name, describe in PARTS.items()}


def describe_setup(setup: TrainSetup) -> dict[str, Any]:
    """The stages with their tokens, and the model that is trained."""
    model: Any = setup.pretrained.model
    stages = [
        (plan.name, plan.epochs, plan.learning_rate, [*plan.splits.train], [*plan.splits.eval])
        for plan in setup.stages
    ]
    parameters = {name: (p.requires_grad, p.dtype, sign(p)) for name, p in model.named_parameters()}
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return {"setup": (stages, parameters, attention, getattr(model, "is_gradient_checkpointing", False))}


def sign(tensor: Tensor) -> tuple[Any, ...]:
    """What tells tensors apart that differ by more than rounding."""
    return (*tensor.shape, round(float(tensor.detach().double().abs().sum()), 3))


def describe_log(folder: Path, printed: str) -> list[dict[str, Any]]:
    """The metrics, but for what may come from rounding."""
    return [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()}
        for record in read_metrics(folder)
    ]


def describe_weights(folder: Path, printed: str) -> dict[str, Any]:
    files = folder.glob("*.safetensors")
    return {name: sign(tensor) for file in files for name, tensor in load_file(file).items()}


def describe_lines(folder: Path, printed: str) -> list[str]:
    """Which steps have a line on the terminal, whether prefixes are shared, and checkpoints."""
    lines = r"^\w+ +\d+/\d+  loss|shared prefixes|sequences are padded|^checkpoint: \S+ MB"
    return re.findall(lines, printed, re.MULTILINE)


def count_samples(folder: Path, printed: str) -> int:
    return sum(file.read_text(encoding="utf-8").count("\n") for file in folder.glob("samples.jsonl"))


PARTS: dict[str, Callable[[Path, str], Any]] = {
    "log": describe_log,
    "weights": describe_weights,
    "lines": describe_lines,
    "files": lambda folder, printed: sorted(path.name for path in folder.iterdir()),
    "samples": count_samples,
}
"""What is known of a run, from its folder and from what it has printed."""
