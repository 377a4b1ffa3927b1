"""What is exported: a trained model in float32, with its tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dpo_wrapper.commands.export.agreement import PromptOutput, compute_outputs
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.data.tokens.tokenizers import Tokenizer
from dpo_wrapper.evaluation.model_pair import check_is_trained, complete_options, load_named
from dpo_wrapper.libraries.error_text import summarize_error
from dpo_wrapper.pretrained import AdapterOrigin, PretrainedModel, read_run
from dpo_wrapper.pretrained.adapter import merge_adapter

Kind = Literal["adapter", "hugging_face", "x_transformers"]


@dataclass(frozen=True)
class ExportSource:
    """A trained model, on the CPU in float32 and in eval mode.

    Attributes:
        name: run folder, folder of an adapter, or Hugging Face model.
        pretrained: the model; with an adapter it is PEFT's, on the base as it was before quantization.
        run: the content of its run.json; empty where it is no run.
        outputs: what it says of the prompts that exports are compared on.
    """

    name: str
    pretrained: PretrainedModel
    run: Mapping[str, Any]
    outputs: tuple[PromptOutput, ...]

    @classmethod
    def load(cls, config: ExportConfig) -> "ExportSource":
        """Load a model; `outputs` is empty before `answer`.

        Raises:
            ValueError: it cannot be loaded, or its weights are quantized.
        """
        check_is_trained(config.model, "the model")
        run = read_run(Path(config.model))
        options: dict[str, Any] = {"tokenizer_options": complete_options({}, run), "dtype": torch.float32}
        pretrained = load_named(config.model, "the model", tokenizer_name=None, max_length=512, **options)
        check_not_quantized(pretrained, config.model)
        pretrained.model.eval().requires_grad_(False)
        return cls(config.model, pretrained, run, ())

    def answer(self, config: ExportConfig) -> "ExportSource":
        """The same with what the model says of the prompts.

        Raises:
            ValueError: the model has too few positions.
        """
        positions = self.pretrained.max_positions
        if positions is not None and config.num_tokens >= positions:
            raise ValueError(
                f"--num-tokens should be below the {positions} positions of {self.name}, but it is "
                f"{config.num_tokens}: give a smaller one."
            )
        outputs = compute_outputs(
            self.pretrained.model,
            self.tokenizer,
            config.prompts,
            config.num_tokens,
            as_chat=self.is_chat,
            max_positions=positions,
        )
        return replace(self, outputs=tuple(outputs))

    @property
    def kind(self) -> Kind:
        if self.pretrained.decoder_args is not None:
            return "x_transformers"
        return "hugging_face" if self.pretrained.adapter is None else "adapter"

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pretrained.tokenizer

    @property
    def is_chat(self) -> bool:
        """Whether prompts are turns of a dialogue: as the run has it, or where there is a chat template."""
        choice = self.run.get("settings", {}).get("as_chat", "auto")
        return self.tokenizer.has_chat_template if choice == "auto" else choice == "always"

    @property
    def was_trained_in_4_bits(self) -> bool:
        """Whether the adapter was trained on other weights than it is exported for."""
        return bool(self.run.get("settings", {}).get("load_in_4bit"))

    def free_memory(self) -> None:
        """Drop the weights, which are of no use once the last export is written."""
        self.pretrained.model.to("meta")

    def merge(self) -> "ExportSource":
        """The same without adapter, which is written into the weights in float32.

        The model of `self` is used up by it.

        Raises:
            ValueError: PEFT cannot merge the adapter.
        """
        pretrained = self.pretrained
        origin = pretrained.adapter
        if origin is None:
            return self
        named = replace(pretrained, adapter=replace(origin, folder=origin.folder or self.name))
        try:
            merged = merge_adapter(named)
        except RuntimeError as error:
            raise ValueError(
                f"the adapter of {self.name} should be one that PEFT can merge, but it cannot "
                f"({summarize_error(error)}): use --to peft."
            ) from error
        return replace(self, pretrained=replace(merged, adapter=None))

    def require_adapter(self, form: str) -> AdapterOrigin:
        """Where the adapter comes from; ValueError if there is none, or another is merged below it."""
        origin = self.pretrained.adapter
        if origin is None:
            raise ValueError(
                f"--to {form} needs a model with an adapter, but {self.name} has none: use --to merged."
            )
        if origin.merged:
            raise ValueError(
                f"--to {form} needs an adapter on a model that others have, but that of {self.name} stands "
                f"on {origin.base_in_words}: use --to merged, and export the adapter of a run on that."
            )
        return origin


def check_not_quantized(pretrained: PretrainedModel, name: str) -> None:
    """Raise ValueError for weights that were quantized before training, which merging would round again."""
    config = getattr(pretrained.model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the weights of {name} should be those before quantization, but its base is a quantized "
            "checkpoint: train on the model that it was made of."
        )
