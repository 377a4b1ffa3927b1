from collections.abc import Iterator
from dataclasses import fields, replace

from dpo_wrapper import Loss, PairLoss
from dpo_wrapper.losses.registry import builtin_losses, divergences_by_name

KINDS = [kind for kind in builtin_losses() if issubclass(kind, PairLoss)]


DIVERGENCES = [kind() for kind in divergences_by_name().values()]


OTHER_VALUES = {"beta": 0.4, "label_smoothing": 0.2, "gamma": 0.3, "tau": 0.7, "penalty": 2.0, "k": 0.2}


def variants(kind: type[Loss]) -> Iterator[Loss]:
    """With its defaults, with other options, and with every divergence."""
    yield kind()
    names = {each.name for each in fields(kind)}
    other = kind(**{name: value for name, value in OTHER_VALUES.items() if name in names})
    if other != kind():
        yield other
    if "divergence" in names:
        yield from (replace(other, divergence=divergence) for divergence in DIVERGENCES[1:])


EVERY = [loss for kind in KINDS for loss in variants(kind)]


def shown(loss: object) -> str:
    return repr(loss) if isinstance(loss, Loss) else str(loss)
