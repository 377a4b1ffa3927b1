"""Every loss of pairs in the package, found by its class, with several options each."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest

from dpo_wrapper import IPO, Loss, PairLoss, Sigmoid, SimPO
from dpo_wrapper.losses import AOT, BCO, BetaDPO, Divergence
from dpo_wrapper.losses.registry import builtin_losses, subclasses_by_name

LOSS_CLASSES: list[type[Loss]] = [loss for loss in builtin_losses() if issubclass(loss, PairLoss)]
DIVERGENCES = [divergence() for divergence in subclasses_by_name(Divergence).values()]
OTHER_OPTIONS = {"beta": 0.4, "label_smoothing": 0.2, "gamma": 0.3, "tau": 0.7, "penalty": 2.0, "k": 0.2}


def iterate_options(loss_class: type[Any]) -> Iterator[Loss]:
    """The loss with its defaults, with other options, and with every divergence."""
    yield loss_class()
    names = {option.name for option in fields(loss_class)}
    other = loss_class(**{name: value for name, value in OTHER_OPTIONS.items() if name in names})
    if other != loss_class():
        yield other
    if "divergence" in names:
        yield from (replace(other, divergence=divergence) for divergence in DIVERGENCES[1:])


EVERY_LOSS = [loss for loss_class in LOSS_CLASSES for loss in iterate_options(loss_class)]


def loss_id(loss: object) -> str:
    """A parameter's name in the list of tests."""
    return repr(loss) if isinstance(loss, Loss) else str(loss)


ONE_OF_EACH_KIND: list[Loss] = [Sigmoid(), IPO(), BCO(), BetaDPO(), AOT(), SimPO()]
"""Of sums and of means, of each side alone, with statistics, of a sorted batch, without a reference."""

EVERY_LOSS_BUT_MOST_SLOW = [
    pytest.param(loss, id=loss_id(loss), marks=[] if loss in ONE_OF_EACH_KIND else [pytest.mark.slow])
    for loss in EVERY_LOSS
]
"""Parameters of a test of whole models: all but one loss of each kind are marked slow."""
