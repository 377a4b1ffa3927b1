"""After which steps of a stage something is due: a line, an evaluation, a checkpoint, samples."""

import math
from dataclasses import dataclass

from dpo_wrapper.training.config import TrainConfig

MAX_EVALUATIONS = 8
"""Intervals between evaluations of a stage, where --eval-steps is not given."""

MIN_EVAL_STEPS = 10
"""Least number of steps between evaluations, where --eval-steps is not given."""

MAX_TRAIN_EVALUATED = 256
"""Train examples that are evaluated at both ends of a stage, to see how their log-probs changed."""

NUM_LINES = 20
"""Lines of a stage, where --logging-steps is not given."""


@dataclass(frozen=True)
class Schedule:
    """Numbers of steps between what is due in a stage; 0 for what is due at its end alone.

    Attributes:
        num_steps: of the stage.
        max_train_evaluated: number of train examples that are evaluated at both ends of the stage.
    """

    num_steps: int
    logging_steps: int
    eval_steps: int
    save_steps: int
    sample_steps: int
    max_train_evaluated: int = MAX_TRAIN_EVALUATED

    def is_end(self, step: int) -> bool:
        """Whether the stage begins or ends here."""
        return step in (0, self.num_steps)

    def is_due(self, interval: int, step: int) -> bool:
        """Whether something of this interval is due after a step: also after the last one."""
        return step > 0 and (step == self.num_steps or (interval > 0 and step % interval == 0))

    def count_due(self, interval: int, step: int) -> int:
        """How often something of this interval is still due, after this step and later ones."""
        before_end = (self.num_steps - 1) // interval - max(0, step - 1) // interval if interval else 0
        return 1 + max(0, before_end)


def plan_schedule(config: TrainConfig, num_steps: int, num_trained: int, num_eval: int) -> Schedule:
    """The schedule of a stage.

    By default a stage is evaluated at both ends and up to 7 times between them, but not more often than every
    10 steps, nor on more than half as many examples as are trained on. Of the train examples no more are
    evaluated than are trained on.

    Args:
        num_steps: of the stage.
        num_trained: examples of all its steps.
        num_eval: examples of an evaluation.
    """
    affordable = num_trained // max(1, 2 * num_eval)
    intervals = max(1, min(MAX_EVALUATIONS, num_steps // MIN_EVAL_STEPS, affordable))
    return Schedule(
        num_steps,
        logging_steps=config.logging_steps or max(1, math.ceil(num_steps / NUM_LINES)),
        eval_steps=config.eval_steps or max(1, math.ceil(num_steps / intervals)),
        save_steps=config.save_steps,
        sample_steps=config.sample_steps,
        max_train_evaluated=min(MAX_TRAIN_EVALUATED, num_trained),
    )
