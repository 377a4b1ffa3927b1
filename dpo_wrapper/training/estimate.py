"""What a run will take, from a few measured steps: `dpo-wrapper train --plan`."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpo_wrapper.dpo import DPO
from dpo_wrapper.prefix_tree import PrefixTree
from dpo_wrapper.training.flops import ForwardFlops
from dpo_wrapper.training.monitoring.memory import (
    measure_held_memory,
    measure_peak_memory,
    reset_peak_memory,
)
from dpo_wrapper.training.schedule import MAX_TRAIN_EVALUATED
from dpo_wrapper.training.trainer import Trainer

NUM_MEASURED_STEPS = 3
MAX_COUNTED_STEPS = 64
"""Steps whose tokens are counted; those of a longer epoch are estimated from so many of its steps."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens that go into the model.

    Attributes:
        padded, real, unique: in padded rows, without padding, and with shared prefixes once.
        scored: those that have a log-prob.
        attended: of each unique token the tokens that it attends to, summed.
    """

    padded: float = 0.0
    real: float = 0.0
    unique: float = 0.0
    scored: float = 0.0
    attended: float = 0.0

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> "TokenCounts":
        return TokenCounts(*(value * factor for value in vars(self).values()))

    @classmethod
    def of_batches(cls, batches: Iterable[Any]) -> "TokenCounts":
        """The tokens of some micro-batches."""
        counts = cls()
        for sequences in (batch.sequences for batch in batches):
            tree = PrefixTree.from_sequences(sequences.unpadded_rows())
            counts += cls(
                padded=sequences.ids.numel(),
                real=float(sequences.real.sum()),
                unique=len(tree.ids),
                scored=len(sequences.target),
                attended=float((tree.position + 1).sum()),
            )
        return counts


@dataclass(frozen=True)
class StageEstimate:
    """What a stage will take on this machine.

    Attributes:
        tokens: of an epoch.
        flops: floating-point operations of the first epoch.
        memory: bytes by kind.
        checkpoint_bytes: of one checkpoint.
        step_seconds: of one step where the reference's log-probs are known.
        seconds: by kind, of the whole stage.
    """

    tokens: TokenCounts
    flops: float
    memory: dict[str, float]
    checkpoint_bytes: float
    step_seconds: float
    seconds: dict[str, float]


def estimate_stage(trainer: Trainer) -> StageEstimate:
    """Count the tokens of a stage and measure some of its steps, which train its model.

    Three steps are run to warm up, then timed, and timed again where the reference's log-probs are kept:
    later epochs look them up.
    """
    trainer.probe_model()
    stage, sampler, device = trainer.stage, trainer.sampler, trainer.accelerator.device
    num_epoch_steps = len(sampler) // stage.epochs
    make_batches = trainer.micro_batch_maker(trainer.splits.train)
    counts = {
        step: TokenCounts.of_batches(make_batches(sampler[step]))
        for step in choose_counted_steps(num_epoch_steps)
    }
    epoch = sum(counts.values(), TokenCounts()) * (num_epoch_steps / len(counts))
    is_padded = stage.scorer.tree_options is None

    def cost(tokens: TokenCounts) -> float:
        """What the time of a pass is proportional to."""
        return tokens.padded if is_padded else tokens.unique

    mean = cost(epoch) / num_epoch_steps
    measured = sorted(counts, key=lambda step: abs(cost(counts[step]) - mean))[:NUM_MEASURED_STEPS]
    measured_cost = sum(cost(counts[step]) for step in measured)

    def time_steps() -> float:
        """Seconds for each token of the measured steps."""
        calls = ((step + 1, make_batches(sampler[step])) for step in measured)
        return time_calls(trainer.train_step, calls) / measured_cost

    reset_peak_memory(device)
    held = measure_held_memory(device)
    time_steps()  # makes the optimizer's state, and takes memory for the first time, which is slower
    if isinstance(stage.module, DPO):
        stage.module.forget_ref_log_probs()
    first_rate = time_steps()
    has_cache = stage.reference_cache is not None
    rate = time_steps() if has_cache else first_rate
    memory = list_memory(trainer, held * 1e9, measure_peak_memory(device) * 1e9)

    batches = [batch.to(device) for step in measured for batch in make_batches(sampler[step])]
    eval_rate = time_calls(stage.evaluate, [(trainer.module, batches, None)]) / measured_cost
    eval_cost = cost(count_split(trainer))
    num_evaluated = min(len(trainer.splits.train), trainer.schedule.max_train_evaluated)
    train_cost = cost(epoch) * num_evaluated / len(trainer.splits.train)
    num_evaluations = 1 + trainer.schedule.count_due(trainer.schedule.eval_steps, 0)
    seconds = {"steps": rate * mean * trainer.num_steps}
    if has_cache:
        shares = (trainer.num_steps / num_epoch_steps, num_evaluated / len(trainer.splits.train))
        share = 1 - math.prod(1 - min(1, share) for share in shares)  # of the pairs, in steps or evaluations
        seconds["reference"] = max(0.0, first_rate - rate) * (share * cost(epoch) + eval_cost)
    seconds["evaluation"] = eval_rate * (num_evaluations * eval_cost + 2 * train_cost)
    has_reference = isinstance(stage.module, DPO) and stage.module.loss.needs_reference
    forward = ForwardFlops.of_model(stage.scorer.language_model.model)
    return StageEstimate(
        tokens=epoch,
        flops=forward.count(cost(epoch), epoch.scored, epoch.attended, has_reference=has_reference),
        memory=memory,
        checkpoint_bytes=memory["gradients"] * (2 if trainer.config.keep_best else 1) + memory["optimizer"],
        step_seconds=rate * mean,
        seconds=seconds,
    )


def choose_counted_steps(num_steps: int) -> list[int]:
    """Up to `MAX_COUNTED_STEPS` steps of an epoch, evenly spread."""
    count = min(num_steps, MAX_COUNTED_STEPS)
    return [k * num_steps // count for k in range(count)]


def count_split(trainer: Trainer) -> TokenCounts:
    """The tokens of the examples to evaluate on, from those of some of them."""
    examples = trainer.splits.eval
    if not len(examples):
        return TokenCounts()
    indices = list(range(min(len(examples), MAX_TRAIN_EVALUATED)))
    counts = TokenCounts.of_batches(trainer.micro_batch_maker(examples)(indices))
    return counts * (len(examples) / len(indices))


def time_calls(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> float:
    """Seconds that calls with these arguments take, until an accelerator is done with them."""
    start = time.perf_counter()
    for arguments in calls:
        function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def list_memory(trainer: Trainer, held: float, peak: float) -> dict[str, float]:
    """Bytes by kind, of memory that was held before the first step and at most during the steps."""
    module: Any = trainer.stage.module
    policy = trainer.stage.scorer.language_model.model
    reference = getattr(module, "ref_model", None)
    weights = measure_storages(policy)
    memory: dict[str, float] = {
        "weights": sum(weights.values()),
        "reference": sum(size for key, size in measure_storages(reference).items() if key not in weights),
        "gradients": sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad),
        "optimizer": sum(
            value.numel() * value.element_size()
            for state in trainer.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
    }
    memory["activations"] = max(0.0, peak - held - memory["gradients"] - memory["optimizer"])
    memory["program and data"] = max(0.0, held - memory["weights"] - memory["reference"])
    return memory


def measure_storages(model: nn.Module | None) -> dict[int, int]:
    """Bytes of each storage of a model's tensors, by its address."""
    if model is None:
        return {}
    tensors = (tensor.untyped_storage() for tensor in model.state_dict().values())
    return {storage.data_ptr(): storage.nbytes() for storage in tensors}


def format_estimate(estimate: StageEstimate) -> str:
    """An estimate in lines that a person reads."""
    tokens, memory = estimate.tokens, estimate.memory
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items() if size >= 5e6)
    times = ", ".join(f"{name} {format_seconds(value)}" for name, value in estimate.seconds.items())
    lines = {
        "tokens of an epoch": (
            f"{tokens.padded:,.0f} padded, {tokens.real:,.0f} real, {tokens.unique:,.0f} unique"
        ),
        "computation": f"{estimate.flops / 1e12:,.3g} TFLOP in the first epoch",
        "memory": f"{sum(memory.values()) / 1e9:.2f} GB ({parts})",
        "a checkpoint": f"{estimate.checkpoint_bytes / 1e6:,.0f} MB",
        "time": (
            f"{format_seconds(sum(estimate.seconds.values()))} ({times}), "
            f"{estimate.step_seconds:.3g} s a step"
            f"{', the reference known' if 'reference' in estimate.seconds else ''}"
        ),
    }
    return "\n".join(f"  {label:20}{text}" for label, text in lines.items())


def format_seconds(seconds: float) -> str:
    """A duration with two units at most."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
