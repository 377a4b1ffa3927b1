"""A reward model of transformers as a judge."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpo_wrapper.evaluation.judges import Judge, ProgressCallback
from dpo_wrapper.evaluation.model_pair import find_placement
from dpo_wrapper.evaluation.prompts import Prompt, format_prompt, join_messages
from dpo_wrapper.libraries.error_text import summarize_error
from dpo_wrapper.libraries.hub import find_on_hub

MAX_BATCH_SIZE = 16
"""Number of texts of one length that go through the model at once."""


class RewardModel(Judge):
    """A sequence classifier of transformers with one output, which is the score.

    It reads a prompt with its completion as its own chat template writes them, or, without a template, as a
    pair of texts. Texts of one length go through the model together, so there is no padding. Of a dialogue
    that is longer than what the model reads the end is taken; of a pair of texts the longer one is cut.

    Args:
        name: folder or name of the model.
        dtype: of the weights; None for float32 on the CPU, and elsewhere for that in which they are stored.
        device: as in `load_model_pair`.

    Raises:
        ValueError: the model cannot be loaded, or it has several outputs.
        ImportError: transformers is missing.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(name)
        place, dtype = find_placement(device, dtype)
        self.model, self.tokenizer = load_classifier(name, dtype)
        self.model.to(place).eval().requires_grad_(False)
        limits = (
            getattr(self.model.config, "max_position_embeddings", None),
            self.tokenizer.model_max_length,
        )
        self.max_length = min(int(limit) for limit in limits if limit)
        self.can_batch = self.model.config.get_text_config().pad_token_id is not None

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        progress: ProgressCallback | None = None,
    ) -> list[float]:
        inputs = [self.encode(*pair) for pair in zip(prompts, completions, strict=True)]
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, fields in enumerate(inputs):
            by_length[len(fields["input_ids"])].append(index)
        scores = [0.0] * len(inputs)
        size = MAX_BATCH_SIZE if self.can_batch else 1
        for indices in by_length.values():
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                for index, value in zip(batch, self.score_batch([inputs[k] for k in batch]), strict=True):
                    scores[index] = value
                if progress is not None:
                    progress(len(batch))
        if not all(map(torch.isfinite, torch.tensor(scores))):
            raise ValueError(
                f"the judge {self.name} should give a finite number for each completion, but it gave "
                "another: compute it in float32, or name another model."
            )
        return scores

    def encode(self, prompt: Prompt, completion: str) -> dict[str, list[int]]:
        """The model's inputs: ids, and what else its tokenizer makes."""
        has_template = self.tokenizer.chat_template is not None
        if has_template:
            messages = [turn.as_dict() for turn in join_messages(prompt, completion)]
            fields = dict(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True))
        else:
            texts = (format_prompt(prompt), completion)
            fields = dict(self.tokenizer(*texts, verbose=False))
        if len(fields["input_ids"]) <= self.max_length:
            return fields
        self.num_cut += 1
        if has_template:
            return {name: values[-self.max_length :] for name, values in fields.items()}
        return dict(self.tokenizer(*texts, truncation="longest_first", max_length=self.max_length))

    def score_batch(self, inputs: Sequence[dict[str, list[int]]]) -> list[float]:
        """The scores of texts of one length."""
        device = next(self.model.parameters()).device
        fields = {
            name: torch.tensor([one[name] for one in inputs], device=device)
            for name in inputs[0]
            if name in ("input_ids", "attention_mask", "token_type_ids")
        }
        logits: Tensor = self.model(**fields).logits
        return logits[:, 0].float().tolist()


@contextmanager
def hide_reports() -> Iterator[None]:
    """Leave out what transformers prints of weights that it misses, which is said in a sentence."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_classifier(name: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The classifier and its tokenizer; arguments as for `RewardModel`."""
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise ImportError("reward models need transformers: pip install 'dpo-wrapper[train]'.") from error
    expected = "--judge should be a function, implicit:RUN or a reward model of transformers"
    model: Any = None
    try:
        files = find_on_hub(name)
        options = {"dtype": dtype or "auto", "output_loading_info": True}
        with hide_reports():
            model, info = AutoModelForSequenceClassification.from_pretrained(files, **options)
        if not info["missing_keys"]:
            tokenizer = AutoTokenizer.from_pretrained(files)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = "its tokenizer" if model is not None else name
        problem = f"{expected}, but {what} could not be loaded ({summarize_error(error)})"
        raise ValueError(f"{problem}: check what is in {name}.") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:2])
        raise ValueError(
            f"{expected}, but {name} has no weights for {missing}: it is a language model, so name a reward "
            "model, or implicit:RUN."
        )
    if model.config.num_labels != 1:
        raise ValueError(
            f"{expected} with one output, but {name} has {model.config.num_labels}: name another, or write a "
            "function that calls it."
        )
    return model, tokenizer
