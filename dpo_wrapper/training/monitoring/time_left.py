"""How long a stage will still take."""

from collections import deque

from dpo_wrapper.training.schedule import Schedule

NUM_RECENT_STEPS = 50
"""Steps whose mean time stands for the steps to come: later epochs may be faster, with a cache."""


class TimeLeft:
    """Estimates how long a stage will still take, from the times of its steps and of what happens between.

    Attributes:
        seconds: what each thing but a step took the last time: eval and train (evaluations), answers (to
            eval prompts), save, sample.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.step_seconds: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self.seconds: dict[str, float] = {}

    def estimate(self, step: int) -> float:
        """Seconds from a step to the end of the stage, as far as the times are known."""
        plan = self.schedule
        intervals = {
            "eval": plan.eval_steps,
            "train": 0,
            "answers": 0,
            "save": plan.save_steps,
            "sample": plan.sample_steps,
        }
        steps = (plan.num_steps - step) * sum(self.step_seconds) / max(1, len(self.step_seconds))
        pauses = (seconds * plan.count_due(intervals[name], step) for name, seconds in self.seconds.items())
        return steps + sum(pauses)
