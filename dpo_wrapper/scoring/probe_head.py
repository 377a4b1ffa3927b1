"""The first forward pass of a model: is it a causal language model, and may its head be applied by itself?"""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.models import LanguageModel, OutputHead
from dpo_wrapper.models.eval_mode import train_mode
from dpo_wrapper.models.wrappers import is_sharded, wrapper_kind
from dpo_wrapper.scoring.rounding import relative_error
from dpo_wrapper.scoring.stand_ins import CalledModules
from dpo_wrapper.scoring.token_log_probs import check_logits


def probe_head(
    model: LanguageModel,
    device: torch.device,
    policy: nn.Module | None,
    needs_grad: bool,
    is_eval: bool,
) -> tuple[int, str | None]:
    """The size of the vocabulary, and why the head may not be applied to scored positions alone (or None).

    Raises TypeError or ValueError for a model that sees ahead, returns something else than logits or, as a
    reference, depends on the policy's trained parameters. With `needs_grad` it warns of parameters that train
    but get no gradient. `is_eval` says whether the model will be called in eval mode.
    """
    ids, starts = causality_rows(model.vocab_size or 2, min(8, model.max_positions or 8))
    ids = ids.to(device)
    head = model.output_head()
    with torch.enable_grad():
        logits = check_logits(first_forward(model, ids), ids)
        if logits.isnan().any():
            raise ValueError(
                "the model's logits should be numbers, but they are NaN: are its weights loaded, and is its "
                "dtype wide enough?"
            )
        trained = set() if policy is None else {id(p) for p in policy.parameters() if p.requires_grad}
        if trained & parameters_reached(logits):
            raise ValueError(
                "the reference's output should not depend on parameters that train, but it does, so it would "
                "follow the policy: give a separately built model as reference = module."
            )
        # rows may differ by rounding, which is that of float32 even inside float64 models
        pairs = ((logits[0, :start], other[:start]) for start, other in zip(starts, logits[1:], strict=True))
        if any(relative_error(*pair, torch.float32)[1] for pair in pairs):
            raise ValueError(
                "the model should be autoregressive, but changing a token changes the logits before it: use "
                "a causal model (in x-transformers a Decoder)."
            )
        reason = why_head_differs(model, head, ids, logits)
        if needs_grad:
            warn_of_missing_gradients(model, ids, logits, is_eval)
    if reason is not None and model.name != "module":
        warnings.warn(f"all logits of the {model.name} model are computed, for {reason}.", stacklevel=3)
    return min(logits.shape[-1], model.vocab_size or logits.shape[-1]), reason


def causality_rows(vocab_size: int, n: int) -> tuple[Int[Tensor, "b n"], list[int]]:
    """A row of ids, and others that differ from it from some positions on: from 1, the middle, and the last.

    In a model that sees ahead within blocks, of whatever size, position 0 sees what follows it.
    """
    row = [(2 * k + 1) * vocab_size // (2 * n) for k in range(n)]  # spread out: small ids are often padding
    starts = sorted({1, n // 2, n - 1} & set(range(1, n)))
    steps = [1 + k * (vocab_size // 4) for k in range(len(starts))]
    others = [
        row[:start] + [(id_ + step) % vocab_size for id_ in row[start:]]
        for start, step in zip(starts, steps, strict=True)
    ]
    return torch.tensor([row, *others], device="cpu"), starts


def first_forward(model: LanguageModel, ids: Int[Tensor, "b n"]) -> object:
    """The model's output for ids; an error it raises is passed on in a sentence."""
    try:
        return model.forward_logits(ids)
    except Exception as error:
        parameters = list(model.model.parameters())
        devices = {p.device for p in parameters}
        if devices and ids.device not in devices:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"the model is on {names} but the ids are on {ids.device}: move one.") from error
        dtypes = sorted({str(p.dtype) for p in parameters if p.is_floating_point()})
        if len(dtypes) > 1 and "dtype" in str(error) and not torch.is_autocast_enabled(ids.device.type):
            raise TypeError(
                f"the model's weights should be of one dtype, but they are {' and '.join(dtypes)}: call DPO "
                f"under torch.autocast({ids.device.type!r}), or convert the model by model.to(dtype)."
            ) from error
        is_of_arguments = isinstance(error, TypeError) and "argument" in str(error)
        remedy = "wrap it in a module that does" if is_of_arguments else "mend it, or wrap it"
        raise TypeError(
            f"the model should take ids of shape (b, n) and nothing else, but given {tuple(ids.shape)} it "
            f"raised {type(error).__name__} ({error}): {remedy}."
        ) from error


def parameters_reached(output: Tensor) -> set[int]:
    """The `id()` of each parameter that a gradient of the output reaches."""
    return {id(node.variable) for node in graph_nodes(output) if hasattr(node, "variable")}


def graph_nodes(output: Tensor) -> set[torch.autograd.graph.Node]:
    """The nodes of the autograd graph behind an output."""
    visited, queue = set[torch.autograd.graph.Node](), [output.grad_fn]
    while queue:
        if (node := queue.pop()) is not None and node not in visited:
            visited.add(node)
            queue.extend(parent for parent, _ in node.next_functions)
    return visited


def why_head_differs(
    model: LanguageModel, head: OutputHead | None, ids: Tensor, logits: Float[Tensor, "b n v"]
) -> str | None:
    """Why the head may not be applied to hidden states outside the model; None if it may."""
    if model.name == "module":
        return "the head of a plain module cannot be reached"
    if head is not None and is_head_sharded(model, head):
        return "its head is sharded, and whole inside the model alone"
    if head is not None and head.weight.is_meta and not logits.is_meta:
        return "its head is offloaded, and in memory inside the model alone"
    if (reason := model.why_own_forward()) is not None:
        return reason
    if head is None:
        return "its head is no linear layer of its own"
    try:
        head_logits = head.compute_logits(model.forward_hidden(ids).to(head.weight.device))
    except Exception as error:  # whatever a model's code may raise, its own logits remain
        return f"its hidden states cannot be had ({type(error).__name__}: {error})"
    if head_logits.shape != logits.shape:
        return f"its head gives logits of shape {tuple(head_logits.shape)} instead of {tuple(logits.shape)}"
    # hooks may compute a weight anew: it is a leaf of the graph, but no parameter
    differing = parameters_reached(head_logits) ^ parameters_reached(logits)
    if any(id(p) in differing for p in model.model.parameters()):
        return "its head alone leaves out trained parameters"
    difference, differs = relative_error(head_logits, logits)
    return f"its head alone gives other logits (relative difference {difference:.1e})" if differs else None


def is_head_sharded(model: LanguageModel, head: OutputHead) -> bool:
    """Whether the head's weight belongs to FSDP or to tensor parallelism, even while it is gathered."""
    module_class: Any
    is_in_fsdp = False
    for module in model.model.modules():
        module_class = type(module)
        if wrapper_kind(module_class) == "sharded":
            is_in_fsdp |= any(p is head.weight for p in module.parameters())
    return is_in_fsdp or hasattr(head.weight, "device_mesh")


def warn_of_missing_gradients(model: LanguageModel, ids: Tensor, logits: Tensor, is_eval: bool) -> None:
    """Warn of parameters that train, but get no gradient because of the mode or of activation checkpointing.

    A parameter that gets none in any mode is not used by the model, nor is one whose module is not called (an
    expert that no token is sent to). Sharded parameters are not looked at: backward would reduce gradients.
    """
    if is_sharded(model.model) or not (missing := missing_gradients(model, logits)):
        return
    with CalledModules(model.model) as calls, torch.no_grad():
        model.forward_logits(ids)
    names = {name for name, p in missing.items() if calls.owns(p)}
    remedy = "call model.enable_input_require_grads()"
    cause = "reentrant activation checkpointing passes none on to a layer whose input needs none"
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.model.modules()):
        if not is_eval:
            return
        with train_mode(model.model):
            names -= missing_gradients(model, model.forward_logits(ids)).keys()
        cause, remedy = "some layers compute none in eval mode", "use disable_dropout = False"
    if names:
        some = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
        warnings.warn(
            f"parameters that train should get gradients, but {len(names)} of the {model.name} model get "
            f"none ({some}), for {cause}: {remedy}.",
            stacklevel=4,
        )


def missing_gradients(model: LanguageModel, logits: Tensor) -> dict[str, nn.Parameter]:
    """The parameters that train but that no gradient of the logits reaches, by name."""
    trained = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    if not has_reentrant_checkpoint(logits):
        reached = parameters_reached(logits)
        return {name: p for name, p in trained.items() if id(p) not in reached}
    for p in trained.values():
        p.grad = None
    logits.float().square().mean().backward()  # such a checkpoint hides its parameters from the graph
    return {name: p for name, p in trained.items() if p.grad is None}


def has_reentrant_checkpoint(output: Tensor) -> bool:
    """Whether a part of the graph behind an output is computed again in backward, and not known before."""
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_nodes(output))
