"""The gradients of the steps of a run, as they are before each update."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dpo_wrapper.reference.sharding import gather_tensor
from dpo_wrapper.training.optimizer_steps import OptimizerSteps


@contextmanager
def recorded_gradients(file: Path) -> Iterator[None]:
    """Write the clipped gradients of all steps of a run inside, by stage, step and parameter, to a file.

    Those of sharded weights are gathered.
    """
    update_weights, recorded, is_writer = OptimizerSteps.update_weights, {}, True

    def record(self, step, metrics, reduce):
        nonlocal is_writer
        is_writer = self.accelerator.is_main_process
        for name, p in self.stage.model.named_parameters():
            if p.grad is not None:
                recorded[f"{self.stage.name} {step} {name}"] = gather_tensor(p.grad).clone()
        update_weights(self, step, metrics, reduce)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OptimizerSteps, "update_weights", record)
        yield
    if is_writer:
        save_file(recorded, file)
