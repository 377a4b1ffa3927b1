"""The order in which examples are trained on."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class StepSampler(Sampler[list[int]], Sequence[list[int]]):
    """The examples of each optimizer step: an epoch takes each example once, in an order of its own.

    The order depends on the seed and the epoch alone. Several processes share the examples of a step, so that
    it is the same step for any number of them, and for any number of workers. `sampler[k]` are the indices of
    step `k`; iterating yields the steps that are not done yet, for `DataLoader(batch_sampler=sampler)`.

    Args:
        num_examples: of the data set, over all processes.
        batch_size: examples of a step, over all processes. The last step of an epoch may have fewer.
        epochs: number of epochs.
        seed: of the order.
        rank, num_processes: this process, which takes every `num_processes`-th example of each step. A
            process for which a step has none takes the first, to take part in what all processes do.

    Attributes:
        steps_done: number of steps that iterating leaves out.
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        epochs: int = 1,
        seed: int = 0,
        *,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if num_examples < 1 or batch_size < 1 or epochs < 0:
            problem = "there should be an example, one or more a step, and 0 or more epochs, but there are"
            raise ValueError(f"{problem} {num_examples}, {batch_size} and {epochs}: correct them.")
        if not 0 <= rank < num_processes:
            problem = f"the rank should be in [0, {num_processes}), but it is {rank}"
            raise ValueError(f"{problem}: give the number of processes.")
        self.num_examples, self.batch_size, self.epochs, self.seed = num_examples, batch_size, epochs, seed
        self.rank, self.num_processes = rank, num_processes
        self.steps_done = 0
        self._steps_per_epoch = -(-num_examples // batch_size)
        self._epoch, self._order = -1, torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.epochs * self._steps_per_epoch

    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return [self[k] for k in range(*step.indices(len(self)))]
        indices = self.global_step(step)
        return indices[self.rank :: self.num_processes] or indices[:1]

    def global_step(self, step: int) -> list[int]:
        """The examples of a step over all processes."""
        if not 0 <= step < len(self):
            raise IndexError(f"there are {len(self)} steps, but step {step} is asked for.")
        epoch, number = divmod(step, self._steps_per_epoch)
        start = number * self.batch_size
        return self._epoch_order(epoch)[start : start + self.batch_size].tolist()

    def step_size(self, step: int) -> int:
        """Number of examples of a step over all processes."""
        is_last_of_epoch = (step + 1) % self._steps_per_epoch == 0
        return (self.num_examples - 1) % self.batch_size + 1 if is_last_of_epoch else self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return (self[step] for step in range(self.steps_done, len(self)))

    def state_dict(self, steps_done: int) -> dict[str, int]:
        """What a sampler needs to go on after a number of steps, also in the middle of an epoch.

        A `DataLoader` with workers asks for steps ahead of their time: the caller counts those that are done.
        """
        names = ("num_examples", "batch_size", "epochs", "seed")
        return {"steps_done": steps_done, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was made, with any number of processes; ValueError for other data."""
        for name, value in self.state_dict(0).items():
            if name != "steps_done" and state[name] != value:
                problem = (
                    f"the state should be that of a sampler with {name} {value}, but it has {state[name]}"
                )
                raise ValueError(f"{problem}: go on with the same data and settings.")
        self.steps_done = state["steps_done"]

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_examples, generator=generator)
        return self._order
