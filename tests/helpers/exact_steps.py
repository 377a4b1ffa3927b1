"""Optimizer steps as the training command takes them, in float64, and what they compute.

`python -m helpers.exact_steps FILE FOLDER`, in any number of processes, takes those of the tables `CASES` and
`UNEVEN` and writes what each computes to a file of the folder.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.micro_batches import MicroBatches
from dpo_wrapper.training.monitoring.trackers import Trackers
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import create_stage
from dpo_wrapper.training.trainer import Trainer
from helpers.datasets import write_rows
from helpers.runs import BUNDLED, SMALL_DECODER

CASES = {
    "sigmoid": ("pairs", {"loss": "sigmoid(beta=0.5)"}),
    "ipo": ("plain", {"loss": "ipo"}),
    "sigmoid and sft": ("pairs", {"loss": "sigmoid + 1.0*sft"}),
    "simpo": ("plain", {"loss": "simpo"}),
    "kto": ("labels", {"loss": "kto(beta=0.3, undesirable=0.8)"}),
    "listwise": ("lists", {"loss": "plackettluce(beta=0.3)"}),
    "supervised": ("pairs", {"stage": ("sft",)}),
}
"""The rows of each, and its options."""

UNEVEN = {"4, 4 and 1 rows": (9, 4), "7 of 8 rows": (7, 8)}
"""Number of rows, and of those of a step."""

INVALID = (2, 5)
"""Rows of which a completion has no token."""


def write_inputs(folder: Path) -> None:
    """A file of each kind of rows."""
    lines = BUNDLED.read_text(encoding="utf-8").splitlines()[:9]
    rows = [{k: json.loads(line)[k] for k in ("prompt", "chosen", "rejected")} for line in lines]
    rows[3]["rejected"] = ""  # its end is scored
    rows[4]["chosen"] *= 20  # which is cut
    plain = [row | {"weight": 1 + k % 3} for k, row in enumerate(rows)]
    pairs = [row | {"margin": 0.3 * (k % 2)} for k, row in enumerate(plain)]
    labels = [
        {"prompt": row["prompt"], "completion": row[("chosen", "rejected")[k % 2]], "label": k % 2 == 0}
        for k, row in enumerate(rows)
    ]
    lists = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], "No."][: 2 + k % 2]}
        for k, row in enumerate(rows)
    ]
    for name, content in {"plain": plain, "pairs": pairs, "labels": labels, "lists": lists}.items():
        write_rows(folder / f"{name}.jsonl", content)


def take_steps(case: str, folder: Path, out: Path, *, num_rows=8, batch_size=8, groups=None, **options):
    """Take the steps of an epoch; returns gradients, weights and metrics by their names.

    Args:
        folder: with the files of `write_inputs`.
        groups: of places in a step, each of which is a micro-batch; by default as --micro-batch-tokens says.
    """
    kind, of_case = CASES[case]
    defaults = {"stage": ("dpo",), "epochs": 1, "learning_rate": 1e-2}
    if "stage" in of_case:
        defaults = {"sft_epochs": 1, "sft_learning_rate": 1e-2}
    config = TrainConfig(
        **{
            "data": folder / f"{kind}.jsonl", "out": out, "seed": 1,
            "batch_size": batch_size, "max_length": 96, "eval_fraction": 0, "allow_empty": True, "cpu": True,
            "lr_scheduler": "constant",
        }
        | defaults
        | of_case
        | options
    )  # fmt: skip
    setup = set_up_training(config)
    setup.pretrained.model.double()
    (plan,) = setup.stages
    examples = [plan.splits.train[k] for k in range(num_rows)]
    for k in INVALID:
        examples[k] = replace(examples[k], completions=(*examples[k].completions[:-1], ()), scored=None)
    splits = replace(plan.splits, train=examples)
    stage = create_stage(setup, replace(plan, splits=splits), create_accelerator(config))
    trainer = Trainer(config, setup.run, stage, splits, setup.pretrained, Trackers(config, setup.run))
    results = {}
    update = trainer.optimizer.step

    def record_and_update():
        named = stage.model.named_parameters()
        results.update({f"gradient {step}, {name}": p.grad.clone() for name, p in named if p.requires_grad})
        update()

    trainer.optimizer.step = record_and_update
    for step in range(1, -(-num_rows // batch_size) + 1):
        indices = trainer.sampler[step - 1]
        if groups is None:
            batches = trainer.micro_batch_maker(examples)(indices)
        else:
            batches = MicroBatches(
                stage.collate_fn([examples[indices[place]] for place in group]) for group in groups
            )
        metrics = trainer.train_step(step, batches)
        results["number of micro-batches"] = torch.tensor(len(batches))
        named = {name: value for name, value in metrics.items() if name not in PACKING}
        results |= {f"{name} {step}": torch.tensor(v, dtype=torch.float64) for name, v in named.items()}
    results |= {f"weight {name}": p.detach().clone() for name, p in stage.model.named_parameters()}
    return results


PACKING = ("tokens/unique", "tokens/padded")
"""Metrics that say how tokens are packed."""


def largest_difference(one, other) -> tuple[float, str]:
    """Of the results of steps, relative to the largest entry of each tensor, and where it is."""
    assert one.keys() == other.keys()
    return max(
        (float((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-30)), k)
        for k in one
        if k != "number of micro-batches"
    )


if __name__ == "__main__":
    inputs, results_folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    PRESETS["tiny"] = SMALL_DECODER
    for case in CASES:
        for name, (num_rows, batch_size) in UNEVEN.items():
            steps = take_steps(case, inputs, results_folder / "out", num_rows=num_rows, batch_size=batch_size)
            save_file(steps, results_folder / f"{case}, {name}.safetensors")
