"""The side of `DPO` that keeps policy and reference together: moves, copies, replacements."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences, SequenceLogProbs
from dpo_wrapper.models.adapters import is_merged
from dpo_wrapper.models.eval_mode import eval_mode
from dpo_wrapper.models.list_modules import list_parameters
from dpo_wrapper.reference.build import build_reference, follow_policy
from dpo_wrapper.reference.frozen_copy import copy_with_closures
from dpo_wrapper.reference.lower_layers import LowerLayers
from dpo_wrapper.reference.reference import ModelReference, Reference
from dpo_wrapper.reference.sync import sync_reference
from dpo_wrapper.scoring.scorer import Scorer

REPLACEABLE = ("policy_model", "ref_model")


class ReferenceOwner(nn.Module):
    """A module that owns a reference beside its policy, and moves, copies and replaces the two rightly.

    Attributes:
        per_token: whether the reference's log-prob of each token is needed.
        disable_dropout: whether the policy is computed without dropout.
        lower_layers: the layers that are computed once for both.
    """

    policy: Scorer
    policy_model: nn.Module
    reference: Reference
    ref_model: nn.Module | None  # the reference's own
    per_token: bool
    disable_dropout: bool

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(remember_loaded_weights)

    def set_reference(self, reference: Reference) -> None:
        module: Any = reference.module
        self.reference = reference
        self.lower_layers = LowerLayers(self.policy, reference, self.disable_dropout)
        super().__setattr__("ref_model", module)
        # DistributedDataParallel wants all tensors that it synchronizes on one device, and their gradients
        is_apart = reference.device is not None
        tensors = () if module is None else (*module.named_parameters(), *module.named_buffers())
        names = [name for name, tensor in tensors if is_apart or tensor.requires_grad]
        self._ddp_params_and_buffers_to_ignore = [f"ref_model.{name}" for name in names]

    def __setattr__(self, name: str, value: Any) -> None:
        """As in `nn.Module`; a `policy_model` or `ref_model` that is replaced is used from then on."""
        if name not in REPLACEABLE or "reference" not in vars(self) or value is getattr(self, name):
            return super().__setattr__(name, value)
        if not isinstance(value, nn.Module):
            raise TypeError(f"{name} should be a module, but it is {value!r}: make a new DPO.")
        if name == "policy_model":
            old = self.policy
            options = (old.impl, old.share_prefix, None, old.is_eval, old.router_aux_loss_coef)
            policy = Scorer(value, *options)
            reference = follow_policy(self.reference, policy)
            super().__setattr__("policy_model", value)
            self.policy = policy
        else:
            has_cache = self.reference.cache is not None
            reference = build_reference(value, self.policy, True, None, None, self.per_token, has_cache)
        self.set_reference(reference)

    def check_trains(self) -> None:
        """ValueError if gradients are wanted but no parameter of the policy can have one."""
        if not (self.training and torch.is_grad_enabled()):
            return
        trains = [p.requires_grad for p in list_parameters(self.policy_model)]
        if trains and not any(trains):
            raise ValueError(
                "a parameter of the policy should train, but all are frozen: call requires_grad_() on those "
                "that should, load an adapter with is_trainable = True, or evaluate under torch.no_grad()."
            )
        if is_merged(self.policy_model):
            raise ValueError(
                "the policy's adapter should be apart from the weights that it adapts to train, but it is "
                "merged into them: call unmerge_adapter() first."
            )

    def policy_mode(self) -> AbstractContextManager[None]:
        """The context in which the policy is computed: without dropout, unless that should stay on."""
        return eval_mode(self.policy_model) if self.disable_dropout else nullcontext()

    @contextmanager
    def reference_model(self) -> Iterator[nn.Module | None]:
        """The context in which a language model is the reference; None where there is no model of it."""
        if not isinstance(self.reference, ModelReference):
            yield None
            return
        with self.reference.frozen():
            yield self.reference.model

    @torch.no_grad()
    def score_sequences(self, sequences: ScoredSequences) -> tuple[SequenceLogProbs, SequenceLogProbs | None]:
        """The log-probs of sequences under policy and reference, without gradients; None without one."""
        with self.lower_layers.recording() as record:
            reference = self.reference(sequences)
        with self.policy_mode(), self.lower_layers.replaying(record, sequences):
            policy = self.policy(sequences)
        return policy, reference

    def sync_reference(self, alpha: float = 0.6) -> None:
        """Move the reference towards the policy: `ref <- alpha * policy + (1 - alpha) * ref` (TR-DPO).

        Gorbatovski 2024 (arXiv 2404.09656). Weights that the two share stay, so that of a policy with an
        adapter only the adapters are mixed, each LoRA factor by itself.
        """
        sync_reference(self.reference, self.policy_model, alpha)

    def explain_reference(self) -> str:
        """What the reference is, which paths it takes, and what is computed once for it and the policy."""
        return f"{self.reference.explain()}{self.lower_layers.explain()}"

    def forget_ref_log_probs(self) -> None:
        """Compute the reference's log-probs anew from now on, where `cache_ref_log_probs` keeps them.

        A change of the reference's weights that autograd counts is noticed without it; call this after one
        that is not counted, by `.data` or in other memory, or after a change of the model's code or settings.
        """
        if isinstance(self.reference, ModelReference) and self.reference.cache is not None:
            self.reference.cache.values.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to()` and its relatives do; a reference with a device of its own is cast but stays there."""
        dtypes = [p.dtype for p in self.parameters()]
        self._apply_to_models(fn, recurse)
        if dtypes != [p.dtype for p in self.parameters()]:
            remember_loaded_weights(self)
        return self

    def _apply_to_models(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        ref_model = self.ref_model
        if ref_model is None or self.reference.device is None:
            super()._apply(fn, recurse)
            return

        def cast(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.device == tensor.device else tensor.to(result.dtype)

        self._modules["ref_model"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._modules["ref_model"] = ref_model
        ref_model._apply(cast)

    def _replicate_for_data_parallel(self) -> Any:
        raise TypeError(
            "DPO should be whole in each process, but nn.DataParallel makes replicas of it in threads: use "
            "DistributedDataParallel."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy whose policy reads no weights but its own, with a tied head in x-transformers too."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy_with_closures(self.__dict__, self, memo))
        return twin


def remember_loaded_weights(owner: ReferenceOwner, *_: Any) -> None:
    """Take the reference's weights as they are after loading or casting policy and reference."""
    owner.forget_ref_log_probs()
    if isinstance(owner.reference, ModelReference):
        owner.reference.shared.remember()
