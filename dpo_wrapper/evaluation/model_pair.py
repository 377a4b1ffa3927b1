"""A model beside its reference, both loaded by name."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dpo_wrapper.data import Tokenizer
from dpo_wrapper.data.tokens.tokenizers import has_tokenizer
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.run_start import RunStart, find_run_start, is_new_model
from dpo_wrapper.evaluation.shared_base import copy_with_adapter, has_same_base
from dpo_wrapper.losses import parse_losses
from dpo_wrapper.losses.combine import LossArgument
from dpo_wrapper.pretrained import PRESETS, PretrainedModel, load_pretrained, read_run
from dpo_wrapper.pretrained.adapter import is_adapter_folder, load_adapter
from dpo_wrapper.reference.reference import AdapterDisabled, ModelReference

DEFAULT_LOSS = "sigmoid(beta=0.1)"
"""Whose rewards are those of a model that is no run: 0.1 times the log-ratio (Rafailov 2023, eq. 5)."""

NO_REFERENCE = "none"
"""The reference's name where there should be none."""

TOKENIZER_PROBE = "Naïve: 3.14 + 2 = ?\n\tdef f(x): return 'été' # 東京 🙂"
"""A text whose ids tell tokenizers apart."""


@dataclass(frozen=True)
class ModelPair:
    """A model beside its reference.

    Attributes:
        policy: the model, with its tokenizer.
        reference: the model that was loaded beside it; None where there is none, or it is the policy itself
            with its adapter off.
        dpo: the two as a `DPO`, on their device, with all weights frozen; its reference is a `NoReference`
            where there is none.
        description: one sentence on what the reference is.
        loss: whose rewards are reported, as `--loss` takes it.
        run: the content of the model's run.json; empty where it is no run.
    """

    policy: PretrainedModel
    reference: PretrainedModel | None
    dpo: DPO
    description: str
    loss: str
    run: Mapping[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.policy.tokenizer

    @property
    def models(self) -> list[PretrainedModel]:
        """The policy, and the reference where it was loaded beside it."""
        return [self.policy] if self.reference is None else [self.policy, self.reference]

    @property
    def max_positions(self) -> int | None:
        """The length of the shorter table of positions; None if no model has one."""
        return min((one.max_positions for one in self.models if one.max_positions is not None), default=None)

    @property
    def as_chat(self) -> bool | None:
        """Whether plain prompts were the user's turn of a dialogue in the run, as in `TokenizeOptions`."""
        choices = {"auto": None, "always": True, "never": False}
        return choices[self.run.get("settings", {}).get("as_chat", "auto")]

    @property
    def has_reference(self) -> bool:
        return isinstance(self.dpo.reference, ModelReference)

    def reference_model(self) -> AbstractContextManager[nn.Module | None]:
        """The context in which a language model is the reference; None where there is none."""
        return self.dpo.reference_model()


def load_model_pair(
    model: str,
    reference: str | None = None,
    *,
    tokenizer: str | None = None,
    max_length: int = 512,
    tokenizer_options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    loss: str | None = None,
) -> ModelPair:
    """Load a model with its reference.

    The reference of a run is what its last stage of training began from: the model with its adapter switched
    off, the model after supervised training, or the model or adapter that it continued. A run that began as
    a new model, and a model that is no run, have none of their own.

    Args:
        model: a run folder, a Hugging Face model by folder or name, or the folder of an adapter.
        reference: another model, named alike, as the reference; 'none' for no reference.
        tokenizer: as `tokenizer_name` in `load_pretrained`.
        max_length: as in `load_pretrained`.
        tokenizer_options: as in `load_tokenizer`; what is None or not given is as in the run.
        dtype: of the weights; None for float32 on the CPU, and elsewhere for that in which they are stored.
        device: where both are computed; None for an accelerator if there is one.
        loss: whose rewards are reported; None for the run's own, and for `DEFAULT_LOSS` otherwise.

    Raises:
        ValueError: a model cannot be loaded, or the reference reads other tokens than the model.
        ImportError: a library that loads the model is missing.
    """
    place, dtype = find_placement(device, dtype)
    for role, name in (("the model", model), ("the reference", reference)):
        check_is_trained(name, role)
    run = read_run(Path(model))
    settings = run.get("settings", {})
    spec = loss or settings.get("loss") or DEFAULT_LOSS
    losses = parse_losses(spec)
    options: dict[str, Any] = {"max_length": max_length, "dtype": dtype}
    options["tokenizer_options"] = complete_options(tokenizer_options or {}, run)
    policy = load_named(model, "the model", tokenizer_name=tokenizer, **options)
    start = choose_start(model, reference, settings, policy)
    other = load_start(start, policy, model, reference, tokenizer, options)
    compared: Any = "adapter" if start.is_policy_without_adapter else other and other.model
    dpo = make_dpo(policy.model, compared, losses).requires_grad_(False).to(place)
    return ModelPair(policy, other, dpo, f"reference: {start.description}.", spec, run)


def make_dpo(policy: nn.Module, reference: nn.Module | Literal["adapter"] | None, loss: LossArgument) -> DPO:
    """A `DPO` for scoring: 'adapter' is the policy with its adapter off, however much that is trained."""
    if reference != "adapter":
        return DPO(policy, loss=loss, reference="none" if reference is None else reference)
    dpo = DPO(policy, loss=loss, reference="none")
    dpo.set_reference(AdapterDisabled(dpo.policy))
    return dpo


def find_placement(
    device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype | None]:
    """Device and dtype as in `load_model_pair`, where None has become what it stands for."""
    place = torch.device(device) if device is not None else None
    if place is None and torch.accelerator.is_available():
        place = torch.accelerator.current_accelerator()
    place = place or torch.device("cpu")
    return place, torch.float32 if dtype is None and place.type == "cpu" else dtype


def complete_options(options: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a tokenizer, with the date and the template's arguments of a run where they are None.

    The run's template is with its tokenizer.
    """
    completed = dict(options)
    if completed.get("today") is None and run.get("today"):
        completed["today"] = date.fromisoformat(run["today"])
    text = run.get("settings", {}).get("chat_template_kwargs")
    if completed.get("template_arguments") is None and text:
        completed["template_arguments"] = json.loads(text)
    return completed


def check_is_trained(name: str | None, role: str) -> None:
    """Raise ValueError if a name stands for a new model with random weights."""
    if name is not None and is_new_model(name) and not Path(name).is_dir():
        raise ValueError(
            f"{role} should be trained, but {name} stands for a new one: name a run folder, an adapter or a "
            "Hugging Face model."
        )


def load_named(name: str, role: str, **options: Any) -> PretrainedModel:
    """`load_pretrained` of a trained model; its errors speak of the role that the model has."""
    try:
        return load_pretrained(name, **options)
    except ValueError as error:
        problem = str(error).replace(f"{', '.join(PRESETS)}, a .json file, ", "", 1)
        raise ValueError(problem.replace("--model should", f"{role} should", 1)) from error


def choose_start(
    model: str, reference: str | None, settings: Mapping[str, Any], policy: PretrainedModel
) -> RunStart:
    """What the reference is: as it is named, or else what the run began from."""
    if reference == NO_REFERENCE:
        return RunStart("none, as --reference asks")
    if reference is None and not settings:
        return RunStart(f"none, for {model} is no training run and --reference names none")
    if reference is None:
        return find_run_start(Path(model), settings, policy.adapter)
    if policy.adapter is not None and not policy.adapter.merged and policy.adapter.base == reference:
        words = f"{policy.adapter.base_in_words} with the adapter switched off"
        return RunStart(words, is_policy_without_adapter=True)
    return RunStart(reference, reference)


def load_start(
    start: RunStart,
    policy: PretrainedModel,
    model: str,
    reference: str | None,
    tokenizer: str | None,
    options: Mapping[str, Any],
) -> PretrainedModel | None:
    """The reference, if it is a model of its own; arguments as in `load_model_pair`."""
    if start.name is None:
        return None
    if has_same_base(model, start.adapter or start.name):
        return copy_with_adapter(policy, start.adapter or start.name)
    if reference is not None:
        is_bare = Path(reference).is_dir() and not (has_tokenizer(reference) or is_adapter_folder(reference))
        name = tokenizer or (policy.tokenizer_name if is_bare else None)
        pretrained = load_named(reference, "the reference", tokenizer_name=name, **options)
        check_same_tokens(pretrained, policy, reference, model)
        return pretrained
    try:
        name = policy.tokenizer_name
        pretrained = load_named(start.name, "the reference", tokenizer_name=name, **options)
        if start.adapter is not None:
            pretrained = load_adapter(start.adapter, pretrained, start.name)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"what {model} began from should be in {start.adapter or start.name} to be its reference, but it "
            f"cannot be loaded ({str(error).rstrip('.')}): name it by --reference, or give --reference none."
        ) from error
    return pretrained


def check_same_tokens(one: PretrainedModel, policy: PretrainedModel, name: str, model: str) -> None:
    """Raise ValueError if a reference's tokenizer is not that of the policy."""
    if one.tokenizer.encode(TOKENIZER_PROBE) != policy.tokenizer.encode(TOKENIZER_PROBE):
        raise ValueError(
            f"the reference should read the same tokens as {model}, but {name} has another tokenizer: name a "
            "reference of the same family."
        )
