"""Completions of policy and reference for the same few prompts, side by side, while a stage runs."""

from collections.abc import Sequence
from statistics import fmean

from torch import nn

from dpo_wrapper.evaluation.prompts import decode_prompt, read_prompt
from dpo_wrapper.evaluation.samples import find_prompts, generate_completions
from dpo_wrapper.pretrained import PretrainedModel
from dpo_wrapper.training.config import STAGES
from dpo_wrapper.training.files import write_json_lines
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.stage_plan import Splits
from dpo_wrapper.training.stages import ProgressCallback, Stage, ignore_progress

Sample = dict[str, str | int | None]
"""A line of samples.jsonl."""


class Samples:
    """The samples of a stage, which samples.jsonl of the run folder holds.

    The reference's completions are generated once, unless the reference changes. Where no model of it is
    kept, they are those of the policy before the first step.

    Args:
        count: number of prompts: the first ones with a completion to imitate, of the eval examples if any.
        first_step: the first step whose samples are not taken yet; those that there are of it are dropped.
        is_writer: whether this process writes the file. Where weights are sharded, others generate as well.
    """

    def __init__(
        self,
        run: RunFolder,
        stage: Stage,
        splits: Splits,
        pretrained: PretrainedModel,
        count: int,
        first_step: int,
        *,
        is_writer: bool = True,
    ) -> None:
        self.is_writer = is_writer
        self.run, self.stage, self.pretrained = run, stage, pretrained
        self.prompts = find_prompts((splits.eval, splits.train), count)
        point = (STAGES.index(stage.name), first_step)
        self.records = [
            one for one in run.read_samples() if (STAGES.index(one["stage"]), one["step"]) < point
        ]
        known = [one["reference"] for one in self.records if one["stage"] == stage.name]
        self.reference_completions: list[str | None] | None = known[-len(self.prompts) :] or None

    @property
    def needs_start(self) -> bool:
        """Whether samples before the first step are all that tells what the reference writes."""
        with self.stage.reference_model() as model:
            return self.stage.has_reference and model is None

    @property
    def needs_reference(self) -> bool:
        """Whether the next samples take the reference's completions anew."""
        return self.reference_completions is None or self.stage.reference_changes

    def count_completions(self) -> int:
        """How many completions the next samples generate."""
        with self.stage.reference_model() as model:
            num_models = 2 if self.needs_reference and model is not None else 1
        return num_models * len(self.prompts)

    def take(self, step: int, progress: ProgressCallback = ignore_progress) -> list[Sample]:
        """Generate completions after a step, and write them; returns their records.

        `progress` is called with the number of prompts that were just answered.
        """
        policy = self.generate(self.stage.model, progress)
        if self.reference_completions is None or self.needs_reference:
            self.reference_completions = self.generate_from_reference(progress)
            if step == 0 and self.needs_start:
                self.reference_completions = [*policy]
        tokenizer = self.pretrained.tokenizer
        new: list[Sample] = [
            {
                "stage": self.stage.name,
                "step": step,
                "prompt": decode_prompt(tokenizer, prompt.ids),
                "readable_prompt": read_prompt(tokenizer, prompt.ids),
                "reference": reference,
                "policy": completion,
                "chosen": tokenizer.decode(prompt.completion),
            }
            for prompt, reference, completion in zip(
                self.prompts, self.reference_completions, policy, strict=True
            )
        ]
        place = (self.stage.name, step)  # of which there are samples if other weights are taken at the end
        self.records = [one for one in self.records if (one["stage"], one["step"]) != place] + new
        if self.is_writer:
            write_json_lines(self.run.samples_file, self.records)
        return new

    def measure_lengths(self, records: Sequence[Sample]) -> dict[str, float]:
        """Mean lengths in tokens of the completions of each model that has any."""
        lengths = {}
        for name in ("policy", "reference"):
            texts = [text for record in records if isinstance(text := record[name], str)]
            if texts:
                lengths[f"length/{name}"] = fmean(len(self.pretrained.tokenizer.encode(t)) for t in texts)
        return lengths

    def generate_from_reference(self, progress: ProgressCallback) -> list[str | None]:
        with self.stage.reference_model() as model:
            return [None] * len(self.prompts) if model is None else [*self.generate(model, progress)]

    def generate(self, model: nn.Module, progress: ProgressCallback) -> list[str]:
        options = (self.pretrained.tokenizer, self.pretrained.max_positions, progress)
        return generate_completions(model, self.prompts, *options)
