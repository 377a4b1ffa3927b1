"""What says how good a completion is: a function, a reward model, or a trained policy's implicit reward."""

import importlib
import math
import runpy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.evaluation.completion_scores import score_completions
from dpo_wrapper.evaluation.model_pair import ModelPair, load_model_pair
from dpo_wrapper.evaluation.prompts import Prompt, encode_completions, format_prompt

IMPLICIT = "implicit:"

ProgressCallback = Callable[[int], object]


class Judge(ABC):
    """Gives each completion a number; a better one has a larger number.

    Attributes:
        name: as it was given.
        num_cut: completions whose text was longer than what the judge's model can read, and was cut.
    """

    num_cut = 0

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        progress: ProgressCallback | None = None,
    ) -> list[float]:
        """One number for each prompt with its completion; `progress` is called with numbers of them done.

        Raises:
            ValueError: the judge gives something else than a finite number.
        """


def load_judge(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tokenizer_options: Mapping[str, Any] | None = None,
) -> Judge:
    """The judge of a name.

    Args:
        spec: `file.py:function` or `package.module:function`, called with prompt and completion as text;
            `implicit:RUN`, the implicit reward of a run and its reference; or a reward model, which
            transformers loads with one output, by folder or name.
        dtype, device, tokenizer_options: of judges with a model, as in `load_model_pair`.

    Raises:
        ValueError: there is no such judge.
        ImportError: a module, or a library that loads a model, is missing.
    """
    if spec.startswith(IMPLICIT):
        name = spec.removeprefix(IMPLICIT)
        pair = load_model_pair(name, dtype=dtype, device=device, tokenizer_options=tokenizer_options)
        return ImplicitJudge(spec, pair)
    if is_function(spec):
        return FunctionJudge(spec, load_function(spec))
    if spec.endswith(".py"):
        raise ValueError(
            f"--judge should name a function of a file, as in rules.py:score, but it is {spec}: write "
            f"{spec}:NAME."
        )
    from dpo_wrapper.evaluation.reward_model import RewardModel

    return RewardModel(spec, dtype=dtype, device=device)


def is_function(spec: str) -> bool:
    """Whether a name is that of a function in a file or a module; no model's name has a colon."""
    return ":" in spec and not Path(spec).exists()


def load_function(spec: str) -> Callable[[str, str], Any]:
    """The function behind `file.py:function` or `package.module:function`.

    Raises:
        ValueError: there is no such file, module or function.
    """
    place, _, name = spec.rpartition(":")
    problem = f"--judge should be a function like rules.py:score, but {spec}"
    try:
        names = runpy.run_path(place) if place.endswith(".py") else vars(importlib.import_module(place))
    except FileNotFoundError as error:
        raise ValueError(f"{problem} names no file that is there: correct the path.") from error
    except ModuleNotFoundError as error:
        if error.name and not f"{place}.".startswith(f"{error.name}."):
            raise  # of a module that the file or module itself imports
        raise ValueError(
            f"{problem} names no module that is there: give the file's path with .py, or correct the name."
        ) from error
    function = names.get(name)
    if not callable(function):
        raise ValueError(f"{problem} names no function of that file or module: correct the name.")
    return function


class FunctionJudge(Judge):
    """A function of prompt and completion as text; a dialogue is written with `Human:` and `Assistant:`."""

    def __init__(self, name: str, function: Callable[[str, str], Any]) -> None:
        super().__init__(name)
        self.function = function

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        progress: ProgressCallback | None = None,
    ) -> list[float]:
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            scores.append(self.call(format_prompt(prompt), completion))
            if progress is not None:
                progress(1)
        return scores

    def call(self, prompt: str, completion: str) -> float:
        expected = f"the judge {self.name} should give a finite number for each completion"
        try:
            value = self.function(prompt, completion)
        except Exception as error:  # it is a user's program: it may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{expected}, but it raised {reason.rstrip('.')}: correct it.") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{expected}, but it gave {value!r}: correct it.")
        return number


class ImplicitJudge(Judge):
    """The implicit reward of a policy and its reference in nats, as the policy's loss has it.

    For DPO it is β times the log-ratio (Rafailov 2023, arXiv 2305.18290, eq. 5, without the part that depends
    on the prompt alone).
    """

    def __init__(self, name: str, pair: ModelPair) -> None:
        super().__init__(name)
        if not pair.has_reference:
            raise ValueError(
                f"{name} should be a run with a reference, but it has none ({pair.description.rstrip('.')}): "
                "name another run."
            )
        self.pair = pair

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        progress: ProgressCallback | None = None,
    ) -> list[float]:
        if not prompts:
            return []
        examples = self.encode(prompts, completions)
        self.num_cut += sum(example.is_cut for example in examples)
        return score_completions(self.pair.dpo, examples, progress=progress).reward.tolist()

    def encode(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[TokenizedExample]:
        positions = self.pair.max_positions
        return encode_completions(
            self.pair.tokenizer,
            prompts,
            [[completion] for completion in completions],
            max_length=None if positions is None else positions + 1,  # the last token is no input
            as_chat=self.pair.as_chat,
        )
