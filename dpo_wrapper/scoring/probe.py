"""The first look at a model: is it a causal language model, and which fast paths give its own log-probs?"""

import warnings
from dataclasses import replace
from typing import Literal

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.log_probs import Impl
from dpo_wrapper.models import LanguageModel, OutputHead
from dpo_wrapper.models.eval_mode import eval_mode, reproducible_forward
from dpo_wrapper.prefix_tree import PrefixSharingError, TreeKernel, TreeOptions
from dpo_wrapper.scoring.token_log_probs import Probe, check_logits, compute_log_probs

SharePrefix = bool | Literal["auto"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative error that counts as rounding."""

FAST_KERNELS: dict[str, TreeKernel] = {"cuda": "flex", "cpu": "branches"}
"""The kernel that is faster than a model's own attention, by kind of device."""


def probe_model(
    model: LanguageModel,
    device: torch.device,
    impl: Impl,
    share_prefix: SharePrefix,
    policy: nn.Module | None = None,
) -> Probe:
    """Run the model on two short rows in eval mode, and try which fast paths give its own log-probs.

    Raises TypeError or ValueError for a model that sees ahead, returns something else than logits or, as a
    reference, depends on the policy's trained parameters, and where `share_prefix` is True but impossible.
    """
    vocab_size, head_applies = probe_head(model, device, policy)
    padded = Probe(device, vocab_size, head_applies, impl, why_padded="share_prefix is False")
    if not share_prefix:
        return padded
    tree = TreeOptions(model.max_positions)
    reason = why_not_shared(model, replace(padded, tree=tree))
    if reason is None:
        faster = replace(tree, kernel=FAST_KERNELS.get(device.type, tree.kernel))
        if why_not_shared(model, replace(padded, tree=faster)) is None:
            tree = faster
        return replace(padded, tree=tree, why_padded=None)
    sentence = f"prefixes are not shared in the {model.name} model, for {reason}"
    if share_prefix is True:
        raise ValueError(f"{sentence}: use share_prefix = 'auto'.")
    if model.name != "module":
        warnings.warn(f"{sentence}; its sequences are padded.", stacklevel=2)
    return replace(padded, why_padded=reason)


# the output head


def probe_head(model: LanguageModel, device: torch.device, policy: nn.Module | None) -> tuple[int, bool]:
    """The size of the vocabulary, and whether the head may be applied to scored positions alone."""
    known_size, n = model.vocab_size or 2, min(5, model.max_positions or 5)
    row = [(2 * k + 1) * known_size // (2 * n) for k in range(n)]  # spread out: small ids are often padding
    ids = torch.tensor([row, [*row[:-1], (row[-1] + 1) % known_size]], device=device)
    head = model.output_head()
    needs_graph = policy is not None or head is not None
    with eval_mode(model.model), reproducible_forward(model.model), torch.set_grad_enabled(needs_graph):
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
        # the two rows may differ by rounding, which is that of float32 even inside float64 models
        _, differs = relative_error(logits[0, :-1], logits[1, :-1], torch.float32)
        if differs:
            raise ValueError(
                "the model should be autoregressive, but changing a token changes the logits before it: use "
                "a causal model (in x-transformers a Decoder)."
            )
        reason = why_head_differs(model, head, ids, logits)
    if reason is not None and model.name != "module":
        warnings.warn(f"all logits of the {model.name} model are computed, for {reason}.", stacklevel=3)
    vocab_size = min(logits.shape[-1], model.vocab_size or logits.shape[-1])
    return vocab_size, reason is None


def first_forward(model: LanguageModel, ids: Int[Tensor, "b n"]) -> object:
    """The model's output for ids; an error it raises is passed on in a sentence."""
    try:
        return model.forward_logits(ids)
    except Exception as error:
        devices = {p.device for p in model.model.parameters()}
        if devices and ids.device not in devices:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"the model is on {names} but the ids are on {ids.device}: move one.") from error
        raise TypeError(
            f"the model should take ids of shape (b, n) and nothing else, but given {tuple(ids.shape)} it "
            f"raised {type(error).__name__} ({error}): wrap it in a module that does."
        ) from error


def parameters_reached(output: Tensor) -> set[int]:
    """The `id()` of each parameter that a gradient of the output reaches."""
    reached, visited, queue = set(), set(), [output.grad_fn]
    while queue:
        if (node := queue.pop()) is not None and node not in visited:
            visited.add(node)
            reached |= {id(node.variable)} if hasattr(node, "variable") else set()
            queue.extend(parent for parent, _ in node.next_functions)
    return reached


def why_head_differs(
    model: LanguageModel, head: OutputHead | None, ids: Tensor, logits: Tensor
) -> str | None:
    """Why the head may not be applied to hidden states outside the model; None if it may."""
    if head is None:
        return "its head is no linear layer of its own"
    if hasattr(head.weight, "device_mesh"):
        return "its head is sharded, and whole inside the model alone"
    try:
        head_logits = head.compute_logits(model.forward_hidden(ids))
    except Exception as error:  # whatever a model's code may raise, its own logits remain
        return f"its hidden states cannot be had ({type(error).__name__}: {error})"
    if head_logits.shape != logits.shape:
        return f"its head gives logits of shape {tuple(head_logits.shape)} instead of {tuple(logits.shape)}"
    difference, differs = relative_error(head_logits, logits)
    if differs:
        return f"its head alone gives other logits (relative difference {difference:.1e})"
    # hooks may compute a weight anew: it is a leaf of the graph, but no parameter
    differing = parameters_reached(head_logits) ^ parameters_reached(logits)
    leaves_out_trained = any(id(p) in differing for p in model.model.parameters())
    return "its head alone leaves out trained parameters" if leaves_out_trained else None


# shared prefixes


@torch.no_grad()
def why_not_shared(model: LanguageModel, probe: Probe) -> str | None:
    """Why the model may not compute prefixes once; None if short pairs get the log-probs of padded rows."""
    if not model.can_share_prefix:
        return "the attention of a plain module cannot be reached"
    assert probe.tree is not None
    n = min(40, model.max_positions or 40)
    if probe.tree.kernel == "flex" and model.max_positions is not None:
        n = min(n, model.max_positions // 4)  # the tree has one row, as `attend_with_kernel` asks for
        if n < 4:
            return "its rows are too short"
    ids = torch.randint(probe.vocab_size, (4, n), generator=torch.Generator().manual_seed(0))
    ids[1, : n // 2], ids[3, : n // 4] = ids[0, : n // 2], ids[2, : n // 4]
    all_true = torch.ones_like(ids, dtype=torch.bool)
    sequences = ScoredSequences.from_padded(ids, all_true, all_true).to(probe.device)
    every_size = replace(probe.tree, min_branch_numel=0)  # the kernel is tried on short branches too
    try:
        with eval_mode(model.model):
            padded = compute_log_probs(model, sequences, replace(probe, tree=None)).tokens
            shared = compute_log_probs(model, sequences, replace(probe, tree=every_size)).tokens
    except PrefixSharingError as error:
        return str(error)
    except Exception as error:  # whatever a model's code may raise, padded rows remain
        return f"{type(error).__name__}: {error}"
    assert padded is not None and shared is not None
    difference, differs = relative_error(shared, padded, narrowest_dtype(model.model, probe.device))
    return f"its log-probs would differ (by {difference:.1e}, relatively)" if differs else None


def narrowest_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The narrowest dtype that a model computes in: autocast's where it is on, else that of its weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 0.1), default=torch.float64)


@jaxtyped(typechecker=beartype)
def relative_error(
    values: Float[Tensor, "*n"], expected: Float[Tensor, "*n"], dtype: torch.dtype = torch.float64
) -> tuple[float, bool]:
    """The largest difference relative to the largest expected value, and whether it is more than rounding.

    `dtype` is what the values were computed in, if narrower than their own. Values that stand for minus
    infinity (masked tokens of a vocabulary) are no scale for the others.
    """
    tolerance = max(TOLERANCE.get(used, 0.1) for used in (values.dtype, expected.dtype, dtype))
    scale = expected.detach().abs()
    scale = scale.masked_fill(scale > torch.finfo(scale.dtype).max / 2, 0.0).double().max().clamp(min=1.0)
    difference = (values.double() - expected.double()).abs().masked_fill(values == expected, 0.0)
    error = (difference.max() / scale).item()
    return error, not error <= tolerance  # NaN counts as a difference
