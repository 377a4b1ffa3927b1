"""The first look at a model: is it a causal language model, and which fast paths give its own log-probs?"""

import warnings
from dataclasses import replace

import torch
from torch import nn

from dpo_wrapper.log_probs import Impl
from dpo_wrapper.models import LanguageModel
from dpo_wrapper.models.eval_mode import eval_mode, reproducible_forward
from dpo_wrapper.prefix_tree import StateKernel, TreeOptions
from dpo_wrapper.scoring.probe import FAST_KERNELS, KERNEL_NAMES, Probe, ProbeKey, SharePrefix
from dpo_wrapper.scoring.probe_head import probe_head
from dpo_wrapper.scoring.probe_modes import EvalModeCheck
from dpo_wrapper.scoring.probe_tree import TreeTrial
from dpo_wrapper.scoring.stand_ins import preserved_state, stand_in_parameters


def probe_model(
    model: LanguageModel,
    key: ProbeKey,
    impl: Impl,
    share_prefix: SharePrefix,
    policy: nn.Module | None = None,
    is_eval: bool = True,
) -> Probe:
    """Run the model on a few short rows, and try which fast paths give its own log-probs and gradients.

    It runs as in training, with gradients if the key has any, and leaves nothing behind. Raises TypeError or
    ValueError as `probe_head` does, and where `share_prefix` is True but impossible. `is_eval` says whether
    the model will be called in eval mode.
    """
    device, needs_grad = key.device, key.trains is not None
    with (
        torch.inference_mode(False),
        preserved_state(model.model, device),
        stand_in_parameters(model.model),
        eval_mode(model.model),
        reproducible_forward(model.model),
    ):
        torch.clear_autocast_cache()
        eval_mode_check = EvalModeCheck(model)
        vocab_size, why_all_logits = probe_head(model, device, policy, needs_grad, is_eval)
        if policy is None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            if is_eval:
                eval_mode_check.check(ids, needs_grad)
        probe = Probe(device, vocab_size, why_all_logits is None, impl, why_all_logits=why_all_logits)
        probe = probe_sharing(model, probe, share_prefix, needs_grad)
        if policy is None:
            eval_mode_check.restore_weights(ids)
    torch.clear_autocast_cache()
    return probe


def probe_sharing(model: LanguageModel, probe: Probe, share_prefix: SharePrefix, needs_grad: bool) -> Probe:
    """The probe with what a trial of shared prefixes finds."""
    if not share_prefix:
        return probe.padded("share_prefix is False")
    reason = model.why_no_tree()
    if reason is None:
        for state in model.state_kernels():
            found = try_sharing(model, probe, needs_grad, state)
            if isinstance(found, Probe):
                return replace(name_layers(model, found), why_along_paths=reason)
            reason = reason or found  # why the fastest way does not fit
    sentence = f"prefixes are not shared in the {model.name} model, for {reason}"
    if share_prefix is True:
        raise ValueError(f"{sentence}: use share_prefix = 'auto'.")
    if model.name != "module":
        warnings.warn(f"{sentence}; its sequences are padded.", stacklevel=2)
    assert reason is not None
    return probe.padded(reason)


def name_layers(model: LanguageModel, probe: Probe) -> Probe:
    """The probe with the classes of layers that carry a state, if such layers have run over its tree."""
    assert probe.tree is not None
    along_paths = {type(layer).__name__ for layer in model.layers_along_paths(probe.tree.state)}
    forked = {type(layer).__name__ for layer in model.recurrent_layers} - along_paths
    return replace(
        probe,
        forked=tuple(sorted(forked)) if "fork" in probe.kernels else (),
        along_paths=tuple(sorted(along_paths)) if "paths" in probe.kernels else (),
    )


def try_sharing(
    model: LanguageModel, probe: Probe, needs_grad: bool, state: StateKernel | None
) -> Probe | str:
    """The probe with the fastest kernel that gives the model's own results over a tree, or why none does."""
    own = TreeOptions(model.max_positions, state=state)
    trial = TreeTrial(model, probe, needs_grad)
    misfits, of_own = [], None
    for kernel in FAST_KERNELS.get(probe.device.type, ()):
        fast = replace(own, kernel=kernel)
        reason, kernels = trial.why_not_shared(fast)
        if kernel not in kernels:
            of_own = reason, kernels  # the model's own attention has run instead
        elif reason is None:
            return replace(probe, tree=fast, kernels=kernels)
        else:
            misfits.append(f"{KERNEL_NAMES[kernel]} does not fit ({reason})")
    reason, kernels = of_own or trial.why_not_shared(own)
    if reason is not None:
        return reason
    not_plain = f"it is not plain softmax attention{model.plain_attention_hint}"
    return replace(probe, tree=own, kernels=kernels, why_own_attention=" and ".join(misfits) or not_plain)
