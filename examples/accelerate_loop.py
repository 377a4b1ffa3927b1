"""A loop of your own with accelerate: exact gradient accumulation, mixed precision, any number of processes.

python examples/accelerate_loop.py --out runs/accelerate
torchrun --nproc_per_node 2 examples/accelerate_loop.py --out runs/accelerate
"""

from contextlib import nullcontext
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from torch.utils.data import DataLoader

from dpo_wrapper import DPO, SFT, PreferenceDataset, Sigmoid
from dpo_wrapper.data import collate_preference
from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.pretrained import load_pretrained, save_pretrained

DATA = Path(__file__).parent / "data" / "preferences.jsonl"


def collate_step(examples, micro_batch_size):
    parts = [examples[k : k + micro_batch_size] for k in range(0, len(examples), micro_batch_size)]
    return [collate_preference(part) for part in parts]


def main(
    model: str = "tiny",
    out: Path | None = None,
    batch_size: int = 16,
    micro_batch_size: int = 4,
    steps: int = 30,
    learning_rate: float = 1e-3,
    precision: Literal["no", "bf16", "fp16"] = "no",
) -> list[dict[str, float]]:
    """Train on the bundled preferences in a loop with accelerate; returns the metrics of each step.

    Args:
        model: tiny, small or medium (a new decoder), or a Hugging Face model by folder or name.
        out: folder that the trained model is saved in.
        batch_size: pairs of an optimizer step, over all processes.
        micro_batch_size: pairs of a forward pass.
        steps: number of optimizer steps.
        learning_rate: of AdamW; a pretrained model wants about 1e-6.
        precision: of the forward passes.
    """
    # without `cpu=True` accelerate lets processes on CPUs train apart from each other
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
    reduce = partial(accelerator.reduce, reduction="sum")
    torch.manual_seed(0)
    pretrained = load_pretrained(model, None, 256)
    dataset = PreferenceDataset.from_file(DATA, pretrained.tokenizer, max_length=256)
    loader = DataLoader(
        dataset.examples,
        batch_size // accelerator.num_processes,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=partial(collate_step, micro_batch_size=micro_batch_size),
        drop_last=True,
    )
    dpo = DPO(pretrained.model, loss=[(Sigmoid(beta=0.1), 1.0), (SFT(), 1.0)])
    optimizer = torch.optim.AdamW(pretrained.model.parameters(), lr=learning_rate)
    module, optimizer, loader = accelerator.prepare(dpo, optimizer, loader)
    history = []
    epochs = chain.from_iterable(repeat(loader))
    for step_batches in islice(epochs, steps):
        sums = MetricSums()
        batches = dpo.normalize_over_step(step_batches, reduce)  # their losses add up to the step's
        for batch in batches:
            with nullcontext() if batch is batches[-1] else accelerator.no_sync(module):
                loss, metrics = module(batch, return_metrics=True)
                # DistributedDataParallel takes the mean over processes
                accelerator.backward(loss * accelerator.num_processes)
            sums.add(metrics)
        optimizer.step()
        optimizer.zero_grad()
        history.append(sums.result(lambda values: reduce(values.to(accelerator.device))))
        shown = "loss {loss:.3f}, accuracy {rewards/accuracies:.2f}".format_map(history[-1])
        accelerator.print(f"step {len(history)}: {shown}")
    if out is not None and accelerator.is_main_process:
        save_pretrained(pretrained, dpo.policy_model, out)
    accelerator.end_training()
    return history


if __name__ == "__main__":
    tyro.cli(main)
