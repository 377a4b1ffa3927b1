"""What the metrics of a run mean, in words, when it happens and once.

docs/training.md has a table of what is said, and when. Thresholds are in nats per token where they can be, so
that they mean the same for short answers and long ones.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dpo_wrapper.losses import CombinedLoss, parse_losses
from dpo_wrapper.training.files import read_json_lines, write_json_lines

CHOSEN_FALL = 0.3
"""Nats per token by which the log-prob of chosen completions may fall: each token is then 26% less likely.

That preference training lowers it is common (Razin 2024, arXiv 2410.08847; Pal 2024, arXiv 2402.13228), and
a few hundredths are of no concern.
"""

KL_LIMIT = 0.5
"""Nats per token between policy and reference on chosen completions: a factor of 1.6 in probability.

Beyond some distance a policy gets worse while its rewards grow (Gao 2022, arXiv 2210.10760; for losses
without a reward model Rafailov 2024, arXiv 2406.02900).
"""

LENGTH_RATIO = 1.5
"""Length of chosen completions over that of rejected ones from which length alone gives a pair away.

In UltraFeedback and HH it is 1.0 to 1.2. Policies learn more length than is in the data (Park 2024, arXiv
2403.19159).
"""

SAMPLE_LENGTH_RATIO = 2.0
MIN_SAMPLE_LENGTH = 20
"""Length of the policy's own completions over the reference's, for the same prompts, and in tokens."""

MIN_PAIRS = 100
"""Pairs that are all right from the second step on: chance, or a hard task, would have left one wrong."""

STUCK_MARGIN = 0.01
"""Reward margin below which `-logsigmoid` of it is ln 2 = 0.693 to two digits."""

STUCK_STEPS = 10
"""Steps whose mean margin is taken, in the second half of the stage, where the learning rate has risen."""

MOVED = 0.01
"""Nats per token on chosen completions from which on a policy has moved, though its margin has not."""

MOSTLY_RIGHT = 0.75
"""Mean accuracy from which on a small margin means that the policy learns slowly."""

CLIPPED_STEPS = 50
CLIPPED_NORM = 10.0
"""Steps in a row with a gradient norm above --max-grad-norm, and by how many times in the median.

Up to some times it is normal: the gradients of whole sequences are large.
"""

LOSS_RISE = 0.1
MIN_LOSS_RISE = 0.05
"""Fraction of the loss, and nats, by which it may rise: more than evaluations and steps differ by chance."""

RISE_STEPS = 20
"""Steps whose mean loss is compared with that of the first so many."""

CUT_SHARE = 0.5
"""Share of prompts or of completions that are cut, from which on a run learns from fragments."""

MetricValues = Mapping[str, Any]


class Explanations:
    """Says each thing once in a stage, also over a run that is resumed.

    Args:
        file: JSON lines of what has been said.
        settings: of the run.
        num_steps: of the stage.
        records: of the stage, that an earlier run has logged.
    """

    def __init__(
        self, file: Path, settings: Mapping[str, Any], num_steps: int, records: Iterable[MetricValues] = ()
    ) -> None:
        self.file, self.settings, self.num_steps = file, settings, num_steps
        self.said = {(line["stage"], line["name"]): line for line in read_json_lines(file)}
        self.steps: deque[MetricValues] = deque(maxlen=max(CLIPPED_STEPS, RISE_STEPS))
        self.first: dict[str, MetricValues] = {}
        self.first_losses: list[float] = []
        self.best_loss, self.num_rises = math.inf, 0
        self.num_right: float = 0
        for record in records:
            self.observe(record["stage"], record["part"], record["step"], record)

    def observe(self, stage: str, part: str, step: int, metrics: MetricValues) -> list[str]:
        """What is to be said of the metrics of a step or an evaluation, and was not said before.

        Args:
            part: "step" for a training step, the split that was evaluated, or "samples" for the mean lengths
                in tokens of completions, "length/policy" and "length/reference".
            step: after which it was measured.
        """
        metrics = {name: value for name, value in metrics.items() if is_finite(value)}
        if part == "step" and "loss" not in metrics:  # it was skipped
            return []
        self.first.setdefault(part, metrics)
        if part == "step":
            self.steps.append(metrics)
            rules = {
                "always right": self.explain_accuracy,
                "nothing is learned": self.explain_stuck_loss,
                "always clipped": self.explain_clipping,
                "loss rises": self.explain_rising_loss,
            }
        elif part == "samples":
            rules = {"samples grow longer": self.explain_sample_lengths}
        else:
            rules = {
                "chosen falls": self.explain_falling_chosen,
                "far from the reference": self.explain_distance,
                "chosen is longer": self.explain_data_lengths,
            }
            rules |= {"eval loss rises": self.explain_rising_eval_loss} if part == "eval" else {}
        sentences = {name: rule(part, step, metrics) for name, rule in rules.items()}
        return [
            self.say(stage, step, name, text)
            for name, text in sentences.items()
            if text is not None and (stage, name) not in self.said
        ]

    def say(self, stage: str, step: int, name: str, text: str) -> str:
        """Note that something is said, and return it with its place."""
        self.said[stage, name] = {"stage": stage, "step": step, "name": name, "text": text}
        write_json_lines(self.file, self.said.values())
        return f"{stage}, step {step}: {text}"

    def explain_falling_chosen(self, part: str, step: int, metrics: MetricValues) -> str | None:
        change = metrics.get("kl/chosen")
        if change is None and "logps/chosen" in metrics:  # a loss without a reference
            change = metrics["logps/chosen"] - self.first[part]["logps/chosen"]
        length = metrics.get("length/chosen")
        if change is None or not length or -change < CHOSEN_FALL * length:
            return None
        per_token = -change / length
        remedy = (
            "a larger weight of its SFT term"
            if "sft" in self.settings["loss"]
            else "an SFT term (--loss 'sigmoid(beta=0.1) + 1.0*sft') or dpop"
        )
        return (
            f"the log-prob of chosen completions has fallen by {-change:.1f} nats, {per_token:.2f} a token. "
            "The loss is content as long as that of rejected ones falls faster, and what both lose goes to "
            f"completions that nobody chose. Each chosen token is now {1 - math.exp(-per_token):.0%} less "
            f"likely: look at samples. What helps: {remedy}, or a lower --learning-rate."
        )

    def explain_distance(self, part: str, step: int, metrics: MetricValues) -> str | None:
        kl, length = metrics.get("kl/chosen"), metrics.get("length/chosen")
        if kl is None or not length or abs(kl) < KL_LIMIT * length:
            return None
        return (
            f"the policy is far from its reference: on chosen completions of {part} its log-prob differs by "
            f"{kl:+.1f} nats, {kl / length:+.2f} a token. Further on, rewards often grow while answers get "
            "worse. What helps: a larger beta, a lower --learning-rate or fewer --epochs."
        )

    def explain_data_lengths(self, part: str, step: int, metrics: MetricValues) -> str | None:
        chosen, rejected = metrics.get("length/chosen"), metrics.get("length/rejected")
        if not chosen or not rejected or chosen < LENGTH_RATIO * rejected:
            return None
        if has_rewards_per_token(self.settings["loss"]) or self.settings["ld_alpha"] < 1:
            return None
        return (
            f"chosen completions are {chosen / rejected:.1f} times as long as rejected ones ({chosen:.0f} "
            f"and {rejected:.0f} tokens), so that length alone tells them apart, and answers may run away in "
            "length. What helps: --ld-alpha 0.5, a loss of mean log-probs (sigmoidnorm, simpo), or pairs of "
            "like lengths."
        )

    def explain_sample_lengths(self, part: str, step: int, metrics: MetricValues) -> str | None:
        policy, reference = metrics["length/policy"], metrics["length/reference"]
        if policy < max(MIN_SAMPLE_LENGTH, SAMPLE_LENGTH_RATIO * reference):
            return None
        return (
            f"the policy's samples are {policy / max(1, reference):.1f} times as long as the reference's "
            f"({policy:.0f} and {reference:.0f} tokens): read them, for length may stand for quality. What "
            "helps: --ld-alpha 0.5, or a loss of mean log-probs (sigmoidnorm, simpo)."
        )

    def explain_accuracy(self, part: str, step: int, metrics: MetricValues) -> str | None:
        accuracy = metrics.get("rewards/accuracies")
        if accuracy is None or step < 2 or self.num_right < 0:
            return None
        count = next((metrics[name] for name in ("pairs/valid", "lists/valid") if name in metrics), 0)
        self.num_right = self.num_right + count if accuracy == 1 else -1
        if self.num_right < MIN_PAIRS:
            return None
        return (
            f"all of the {self.num_right:.0f} pairs from the second step on were right. Nothing hard is "
            "learned that fast: chosen and rejected differ in something trivial, such as a prompt, a marker, "
            "a template or a length that one side alone has. Compare them: dpo-wrapper prepare --data ... "
            "--preview 5."
        )

    def explain_stuck_loss(self, part: str, step: int, metrics: MetricValues) -> str | None:
        recent = list(self.steps)[-STUCK_STEPS:]
        if len(recent) < STUCK_STEPS or step < self.num_steps / 2:
            return None
        is_right = fmean(one.get("rewards/accuracies", 0.5) for one in recent) >= MOSTLY_RIGHT
        margins = [one["rewards/margins"] for one in recent if "rewards/margins" in one]
        if not margins or abs(fmean(margins)) >= STUCK_MARGIN:
            return None
        if all(one.get("logps/chosen") == one.get("logps/rejected") for one in recent):
            why = "The two sides of each pair are the same: look at the data."
        elif all(one.get("grad_norm", 1) < 1e-6 for one in recent):
            why = "The gradients are zero: what trains does not reach the output."
        elif not is_right and abs(fmean(distance_per_token(one) for one in recent)) >= MOVED:
            why = (
                "The policy moves, but its two sides move alike: the pairs are too hard to tell apart or "
                f"labelled by chance, or the learning rate, {metrics['lr']:.1e}, is too large."
            )
        else:
            why = f"The learning rate, {metrics['lr']:.1e}, is too small for this model and these steps."
        return (
            f"after half of the steps the reward margin is {fmean(margins):.4f}, where it began, and the "
            f"loss of a pair ln 2 = 0.693. {why}"
        )

    def explain_clipping(self, part: str, step: int, metrics: MetricValues) -> str | None:
        norms = [one["grad_norm"] for one in list(self.steps)[-CLIPPED_STEPS:] if "grad_norm" in one]
        limit = self.settings["max_grad_norm"]
        if len(norms) < CLIPPED_STEPS or min(norms) <= limit or median(norms) < CLIPPED_NORM * limit:
            return None
        return (
            f"the norm of the gradients was above --max-grad-norm {limit:g} in each of the last "
            f"{CLIPPED_STEPS} steps, and {median(norms):.3g} in the median. Steps differ in direction alone "
            "then, and rare large gradients weigh no less than others. What helps: a larger --max-grad-norm, "
            "or a smaller beta."
        )

    def explain_rising_loss(self, part: str, step: int, metrics: MetricValues) -> str | None:
        if len(self.first_losses) < RISE_STEPS:
            self.first_losses.append(metrics["loss"])
            return None
        before = fmean(self.first_losses)
        after = fmean(one["loss"] for one in list(self.steps)[-RISE_STEPS:])
        if after - before < max(MIN_LOSS_RISE, LOSS_RISE * abs(before)):
            return None
        return (
            f"the loss has risen: the mean of the last {RISE_STEPS} steps is {after:.4f}, that of the first "
            f"{before:.4f}. What helps: a lower --learning-rate, a larger --warmup-ratio or --batch-size."
        )

    def explain_rising_eval_loss(self, part: str, step: int, metrics: MetricValues) -> str | None:
        loss = metrics.get("loss", math.inf)
        rises = loss - self.best_loss >= max(MIN_LOSS_RISE, LOSS_RISE * abs(self.best_loss))
        self.num_rises = self.num_rises + 1 if rises else 0
        self.best_loss = min(self.best_loss, loss)
        if self.num_rises < 2:
            return None
        return (
            f"the eval loss has risen from {self.best_loss:.4f} to {loss:.4f}, in two evaluations in a row. "
            "If the loss of the steps falls, the model learns the train rows by heart. What helps: fewer "
            "epochs, --keep-best, --early-stopping-patience, or more data."
        )


def explain_cuts(num_cut: int, total: int, what: str, max_length: int) -> list[str]:
    """A sentence if most prompts or completions are cut, and nothing else.

    Args:
        num_cut, total: number of those that are cut, and of all.
        what: prompts or completions.
    """
    if not total or num_cut < CUT_SHARE * total:
        return []
    return [
        f"{num_cut / total:.0%} of the {what} are cut at --max-length {max_length}, so that the model learns "
        "from fragments: raise it, or leave long rows out (--on-long drop)."
    ]


def has_rewards_per_token(losses: str) -> bool:
    """Whether a sum of losses, as --loss has it, compares mean log-probs."""
    loss = CombinedLoss(parse_losses(losses)).reward_loss
    return loss is not None and loss.is_per_token


def distance_per_token(metrics: MetricValues) -> float:
    """The log-ratio of policy and reference on chosen completions, in nats per token."""
    return float(metrics.get("kl/chosen", 0.0) / max(1.0, metrics.get("length/chosen", 0.0)))


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
