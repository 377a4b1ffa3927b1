"""A first look at a model: whether it is what it should be, and whether its head may be called on its own."""

import warnings

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor, nn

from dpo_wrapper.models import LanguageModel, OutputHead
from dpo_wrapper.models.eval_mode import eval_mode, reproducible_forward
from dpo_wrapper.validation import kind

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def look_at(model: LanguageModel, device: torch.device, apart_from: nn.Module | None) -> tuple[int, bool]:
    """The size of the vocabulary, and whether the head may be applied to scored positions alone.

    Two rows of a few tokens, in eval mode. Refuses a model that sees ahead, that returns something else than
    logits, or whose output depends on a parameter that trains in `apart_from`.
    """
    known, n = model.vocab_size or 2, min(5, model.max_positions or 5)
    row = [(2 * k + 1) * known // (2 * n) for k in range(n)]  # spread out: small ids are often padding
    ids = torch.tensor([row, [*row[:-1], (row[-1] + 1) % known]], device=device)
    head = model.output_head()
    follows = apart_from is not None
    with (
        eval_mode(model.model),
        reproducible_forward(model.model),
        torch.set_grad_enabled(follows or head is not None),
    ):
        logits = valid_logits(first_answer(model, ids), ids)
        if logits.isnan().any():
            raise ValueError(
                "the model's logits are NaN: are its weights loaded, and is its dtype wide enough?"
            )
        if apart_from is not None:
            trained = {id(p) for p in apart_from.parameters() if p.requires_grad}
            if trained & reached_from(logits):
                raise ValueError(
                    "the reference's output depends on parameters that train, so it would follow the policy: "
                    "give a separately built model as reference = module."
                )
        # rounding alone may differ between the two rows, in float32 even inside float64 models
        worst, _ = difference(logits[0, :-1], logits[1, :-1])
        if worst > max(TOLERANCE[torch.float32], TOLERANCE.get(logits.dtype, 0.1)):
            raise ValueError(
                "the model is not autoregressive, for changing a token changes the logits before it: "
                "use a causal model (in x-transformers a Decoder)."
            )
        reason = (
            "its head is no linear layer of its own" if head is None else why_not(model, head, ids, logits)
        )
    if reason is not None and model.name != "module":
        warnings.warn(f"all logits of the {model.name} model are computed, for {reason}.", stacklevel=2)
    size = min(logits.shape[-1], model.vocab_size or logits.shape[-1])
    return size, head is not None and reason is None


def first_answer(model: LanguageModel, ids: Int[Tensor, "b n"]) -> object:
    """What the model makes of ids; if it cannot take them, that is told with its own words."""
    try:
        return model.forward_logits(ids)
    except Exception as error:
        devices = {p.device for p in model.model.parameters()}
        if devices and ids.device not in devices:
            own = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"the model is on {own} but the ids are on {ids.device}: move one of them."
            ) from error
        raise TypeError(
            f"the model should take ids of shape (b, n) and nothing else, but given {tuple(ids.shape)} it "
            f"raised {type(error).__name__} ({error}): wrap it in a module that does."
        ) from error


def valid_logits(logits: object, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
    """What a model has returned for ids, if it is logits."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else kind(logits)
        raise TypeError(
            f"the model should return logits, a float tensor or an output with .logits, not {got}: give one "
            "with a language-model head (AutoModelForCausalLM), or wrap it in a module that returns logits."
        )
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise TypeError(
            f"the model should return logits of shape (b, n, v), for ids of shape {tuple(ids.shape)}, "
            f"but their shape is {tuple(logits.shape)}: wrap it in a module that returns one row for each id."
        )
    if logits.device != ids.device:
        raise ValueError(
            f"the model's logits are on {logits.device} but the ids on {ids.device}: move the model there."
        )
    return logits


def reached_from(output: Tensor) -> set[int]:
    """Ids of the parameters that a gradient of the output would reach."""
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None and node not in seen:
            seen.add(node)
            found |= {id(node.variable)} if hasattr(node, "variable") else set()
            waiting.extend(parent for parent, _ in node.next_functions)
    return found


def why_not(model: LanguageModel, head: OutputHead, ids: Tensor, logits: Tensor) -> str | None:
    """Why the head may not be applied to hidden states outside the model; None if it may."""
    if hasattr(head.weight, "device_mesh"):
        return "its head is sharded, and whole inside the model alone"
    try:
        got = head.compute_logits(model.forward_hidden(ids))
    except Exception as error:  # whatever a model's code may raise, there is the plain path
        return f"its hidden states cannot be had ({type(error).__name__}: {error})"
    if got.shape != logits.shape:
        return f"its head gives logits of shape {tuple(got.shape)} instead of {tuple(logits.shape)}"
    worst, differs = difference(got, logits)
    if differs:
        return f"its head alone gives other logits (relative difference {worst:.1e})"
    differ = reached_from(got) ^ reached_from(logits)  # beside parameters, what hooks made leaves of
    trained = any(id(p) in differ for p in model.model.parameters())
    return "its head alone leaves out trained parameters" if trained else None


def rounding(device: torch.device, model: nn.Module) -> torch.dtype:
    """The narrowest dtype that a model computes in: autocast's where it is on, else that of its weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(floats, key=lambda dtype: TOLERANCE.get(dtype, 0.1), default=torch.float64)


@jaxtyped(typechecker=beartype)
def difference(
    got: Float[Tensor, "*n"], expected: Float[Tensor, "*n"], inside: torch.dtype = torch.float64
) -> tuple[float, bool]:
    """The largest difference relative to the largest expected value, and whether it is more than rounding.

    `inside` is the dtype of what they were computed with, if that is narrower than their own. Values that
    stand for minus infinity (masked tokens of a vocabulary) are no scale for the others.
    """
    tolerance = max(TOLERANCE.get(dtype, 0.1) for dtype in (got.dtype, expected.dtype, inside))
    scale = expected.detach().abs()
    scale = scale.masked_fill(scale > torch.finfo(scale.dtype).max / 2, 0.0).double().max().clamp(min=1.0)
    gap = (got.double() - expected.double()).abs().masked_fill(got == expected, 0.0)
    worst = (gap.max() / scale).item()
    return worst, not worst <= tolerance  # NaN counts as a difference
