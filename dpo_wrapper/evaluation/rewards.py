"""The implicit reward of completions, for code of one's own."""

from collections.abc import Sequence
from typing import Any, overload

from torch import nn

from dpo_wrapper.data import Tokenizer
from dpo_wrapper.data.rows.messages import Message, Turns, parse_messages
from dpo_wrapper.data.tokens.tokenizers import as_tokenizer
from dpo_wrapper.dpo import DPO
from dpo_wrapper.evaluation.completion_scores import score_completions
from dpo_wrapper.evaluation.model_pair import ModelPair, load_model_pair, make_dpo
from dpo_wrapper.evaluation.prompts import Prompt, encode_completions
from dpo_wrapper.losses import Loss, Sigmoid

PromptLike = str | Sequence[Message] | Sequence[dict[str, Any]]


@overload
def reward(
    model: Any,
    reference: Any,
    prompt: PromptLike,
    completion: str,
    *,
    tokenizer: Any = None,
    loss: Loss | None = None,
) -> float: ...
@overload
def reward(
    model: Any,
    reference: Any,
    prompt: PromptLike,
    completion: Sequence[str],
    *,
    tokenizer: Any = None,
    loss: Loss | None = None,
) -> list[float]: ...
def reward(
    model: nn.Module | str | ModelPair,
    reference: nn.Module | str | None,
    prompt: PromptLike,
    completion: str | Sequence[str],
    *,
    tokenizer: Any = None,
    loss: Loss | None = None,
) -> float | list[float]:
    """The implicit reward of a completion in nats, by default `0.1 * (log p(y | x) - log r(y | x))`.

    Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290), eq. 5, without the part that
    depends on the prompt alone. Rewards of completions of one prompt can be compared, those of different
    prompts cannot. The end of the answer counts as a token of it. Nothing is cut.

    Args:
        model: the policy: a causal LM of transformers, an x-transformers decoder, a name as in
            `load_model_pair`, which is loaded at each call, or what that returned.
        reference: another such model; 'adapter', the policy with its PEFT adapter off; 'none', or None for
            what a named run began from, for that of a `ModelPair`, and for no reference of a module.
        prompt: plain text, which is the user's turn where the tokenizer has a chat template, or messages.
        completion: one text, or a list of them, whose prompt is computed once.
        tokenizer: one of transformers, or a `Tokenizer`; None for that of the model's folder or name.
        loss: whose rewards they are; None for those of a named run's loss, and of `Sigmoid(0.1)` otherwise.

    Returns:
        A number for one text, and a list for a list.

    Raises:
        TypeError: a prompt or completion is not what it should be.
        ValueError: the tokenizer cannot be found, a model cannot be loaded, or no completion is given.
    """
    if isinstance(completion, str):
        return reward(model, reference, prompt, [completion], tokenizer=tokenizer, loss=loss)[0]
    completions = check_completions(completion)
    turns = as_prompt(prompt)
    dpo, own_tokenizer, as_chat = as_dpo(model, reference, tokenizer, loss)
    [example] = encode_completions(own_tokenizer, [turns], [completions], as_chat=as_chat)
    return score_completions(dpo, [example]).reward.tolist()


def check_completions(completions: Any) -> list[str]:
    if not isinstance(completions, (list, tuple)) or not all(isinstance(text, str) for text in completions):
        raise TypeError(
            f"completion should be a text or a list of texts, but it is {completions!r}: decode token ids "
            "first."
        )
    if not completions:
        raise ValueError("completion should hold at least one text, but the list is empty: give one.")
    return list(completions)


def as_prompt(prompt: PromptLike) -> Prompt:
    """A prompt as text or messages; ValueError or TypeError if it is neither."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, (list, tuple)) and all(isinstance(turn, Message) for turn in prompt) and prompt:
        turns: Turns = tuple(prompt)
        return turns
    return parse_messages(prompt, "prompt")


def as_dpo(
    model: nn.Module | str | ModelPair,
    reference: nn.Module | str | None,
    tokenizer: Any,
    loss: Loss | None,
) -> tuple[DPO, Tokenizer, bool | None]:
    """Policy and reference of the arguments of `reward`, the tokenizer, and how plain prompts are taken."""
    if isinstance(model, (str, ModelPair)):
        pair = as_pair(model, reference)
        dpo = pair.dpo
        if loss is not None:
            given: Any = dpo.ref_model or ("adapter" if pair.has_reference else None)
            dpo = make_dpo(pair.policy.model, given, loss)
        return dpo, pair.tokenizer if tokenizer is None else as_tokenizer(tokenizer), pair.as_chat
    if isinstance(reference, str) and reference not in ("adapter", "none"):
        raise TypeError(
            "reference should be a module, 'adapter', 'none' or None where the model is a module, but it is "
            f"{reference!r}: load it first."
        )
    own = as_tokenizer(find_tokenizer_name(model) if tokenizer is None else tokenizer)
    if not isinstance(reference, str):
        return make_dpo(model, reference, loss or Sigmoid()), own, None
    if reference == "none":
        return make_dpo(model, None, loss or Sigmoid()), own, None
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            "reference = 'adapter' switches the policy's PEFT adapter off, but this model has none: give the "
            "reference as a module."
        )
    return make_dpo(model, "adapter", loss or Sigmoid()), own, None


def as_pair(model: str | ModelPair, reference: nn.Module | str | None) -> ModelPair:
    """The pair of a name, or the pair that is given; TypeError for a reference that does not go with it."""
    if isinstance(reference, nn.Module):
        raise TypeError(
            "reference should be a name or None where the model is given by name, but it is a module: load "
            "both, or give both names."
        )
    if isinstance(model, str):
        return load_model_pair(model, reference)
    if reference is not None:
        raise TypeError(
            f"reference should be None beside a ModelPair, which has its own, but it is {reference!r}: leave "
            "it out, or load another pair."
        )
    return model


def find_tokenizer_name(model: nn.Module) -> str:
    """Folder or name that a model of transformers was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ValueError(
            f"the tokenizer should be given for a {type(model).__name__} that does not say where it was "
            "loaded from, but it is None: give tokenizer=..."
        )
    return str(name)
