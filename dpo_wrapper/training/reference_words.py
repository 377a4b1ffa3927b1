"""What the reference of a run is, in words, and what to merge in which order once its adapter is trained."""

from pathlib import Path

from dpo_wrapper.pretrained import AdapterOrigin, PretrainedModel
from dpo_wrapper.reference import CachedReference
from dpo_wrapper.reference.reference import AdapterDisabled, NoReference, Reference
from dpo_wrapper.training.config import StageName, TrainConfig


def describe_reference(
    reference: Reference, pretrained: PretrainedModel, config: TrainConfig, stage_before: StageName | None
) -> str:
    """One sentence on the reference of preference training, which began after `stage_before`."""
    if isinstance(reference, NoReference):
        why = "as --reference asks" if config.reference == "none" else f"for --loss {config.loss} needs none"
        return f"reference: none, {why}."
    model = describe_model(pretrained, config, stage_before)
    if isinstance(reference, AdapterDisabled):
        assert pretrained.adapter is not None
        return f"reference: {pretrained.adapter.base_in_words} with the adapter switched off."
    if isinstance(reference, CachedReference):
        return f"reference: {model}; its log-probs are computed before training, and no copy is kept."
    places = [f"in {config.reference_dtype}"] if config.reference_dtype else []
    places += [f"on {config.reference_device}"] if config.reference_device else []
    if pretrained.adapter is None or places:
        model = " ".join(["a frozen copy", *places, "of", model])
    if config.ref_model_sync_steps:
        share = f"{config.ref_model_mixup_alpha:g} of the way"
        model += f"; every {config.ref_model_sync_steps} steps it moves {share} to the policy"
    return f"reference: {model}."


def describe_model(pretrained: PretrainedModel, config: TrainConfig, stage_before: StageName | None) -> str:
    """The model as it is when preference training begins."""
    origin = pretrained.adapter
    if origin is None and stage_before is None:
        return "the new model" if config.is_new_model else f"the model as it was loaded from {config.model}"
    if origin is None:
        return f"the model as it is after {stage_before}"
    base = origin.base_in_words
    if stage_before is not None:
        return f"{base} with the adapter as it is after {stage_before}"
    if origin.folder is not None:
        return f"{base} with the adapter as it was loaded from {origin.folder}"
    return f"{base} with the adapter as it begins, which changes nothing"


def describe_merging(origin: AdapterOrigin, out: Path) -> str:
    """One sentence on what the adapter in a run folder is merged into."""
    steps = [*origin.merged, str(out)]
    rest = "".join(f", then {folder} into the result" for folder in steps[1:])
    return f"afterwards: to make one model, merge {steps[0]} into {origin.base}{rest}."
