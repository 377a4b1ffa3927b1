"""Steps of training whose loss is made not finite, and the states before and after them."""

import math
from contextlib import contextmanager

import pytest
import torch

from dpo_wrapper.training.trainer import Trainer


@contextmanager
def poison_steps(*steps, stage="dpo", value=math.nan):
    """The context in which the loss of some steps of a stage is multiplied by a value.

    It is a list of what the states were before and after each of these steps.
    """
    train_step, noted = Trainer.train_step, []

    def poisoned_step(self, step, batches):
        if self.stage.name != stage or step not in steps:
            return train_step(self, step, batches)
        micro_batch_loss = self.stage.micro_batch_loss

        def poisoned_loss(module, batch):
            loss, metrics = micro_batch_loss(module, batch)
            return loss * value, metrics

        self.stage.micro_batch_loss = poisoned_loss
        before = copy_state(self)
        try:
            return train_step(self, step, batches)
        finally:
            noted.append((before, copy_state(self)))
            self.stage.micro_batch_loss = micro_batch_loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", poisoned_step)
        yield noted


def copy_state(trainer):
    """Weights and statistics of the module, moments and step counts of the optimizer, by their names."""
    state = {name: value.clone() for name, value in trainer.stage.module.state_dict().items()}
    for k, of_weight in enumerate(trainer.optimizer.state.values()):
        state |= {f"{name} {k}": torch.as_tensor(value).clone() for name, value in of_weight.items()}
    if trainer.stage.name == "dpo":
        states = trainer.stage.dpo.loss.states
        state |= {f"sums {k}": torch.tensor(one.step_sums) for k, one in enumerate(states)}
    return state


def assert_states_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
