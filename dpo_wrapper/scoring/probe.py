"""What the first look at a model has found, and the state of a model for which that holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch

from dpo_wrapper.log_probs import Impl
from dpo_wrapper.models import LanguageModel
from dpo_wrapper.models.list_modules import list_modules
from dpo_wrapper.models.wrappers import wrapper_kind
from dpo_wrapper.prefix_tree import StateKernel, TreeKernel, TreeOptions

SharePrefix = bool | Literal["auto"]

FAST_KERNELS: dict[str, tuple[TreeKernel, ...]] = {"cuda": ("flash", "flex"), "cpu": ("branches",)}
"""The kernels that are faster than a model's own attention, by kind of device, the fastest first."""

KERNEL_NAMES: dict[TreeKernel, str] = {
    "flash": "FlashAttention",
    "flex": "FlexAttention",
    "branches": "torch's kernel on each long branch",
}


@dataclass(frozen=True)
class ProbeKey:
    """The state of a model that may change what a probe finds.

    Attributes:
        device: of the token ids.
        autocast: the dtype of autocast; None where it is off.
        dtypes: those of the weights; none where they are sharded, whose dtype changes as they are gathered.
        trains: whether each parameter trains; None where no gradient is computed.
        checkpointed: the number of modules that checkpoint activations, where gradients are computed.
        structure: a hash of the class of each module, its own forward method if it has one, and the number of
            its hooks.
    """

    device: torch.device
    autocast: torch.dtype | None
    dtypes: frozenset[torch.dtype]
    trains: tuple[bool, ...] | None
    checkpointed: int
    structure: int

    @classmethod
    def of_model(cls, model: LanguageModel, device: torch.device) -> "ProbeKey":
        """The state that a model is in now. This runs in every forward pass, so it reads attributes alone."""
        trains: list[bool] = []
        structure: list[Any] = []
        dtypes: set[torch.dtype] = set()
        checkpointed, any_sharded = 0, False
        for module in list_modules(model.model):
            attributes, module_class = module.__dict__, cast(Any, type(module))
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            structure.append((module_class, id(attributes.get("forward")), hooks))
            for parameter in attributes["_parameters"].values():
                if parameter is not None:
                    trains.append(parameter.requires_grad)
                    dtypes.add(parameter.dtype)
            if "gradient_checkpointing" in attributes:
                checkpointed += bool(attributes["gradient_checkpointing"])
            if (kind := wrapper_kind(module_class)) is not None:
                checkpointed += kind == "checkpoint"
                any_sharded = any_sharded or kind == "sharded"
        is_autocast = torch.is_autocast_enabled(device.type)
        needs_grad = torch.is_grad_enabled() and any(trains)
        return cls(
            device,
            torch.get_autocast_dtype(device.type) if is_autocast else None,
            frozenset() if any_sharded else frozenset(dtypes),
            tuple(trains) if needs_grad else None,
            checkpointed if needs_grad else 0,
            hash(tuple(structure)),
        )

    def without_gradients(self) -> "ProbeKey":
        """The key of the same model where no gradient is computed."""
        return replace(self, trains=None, checkpointed=0)


@dataclass(frozen=True)
class Probe:
    """What the first look at a model found, and so which paths its forward passes take.

    Attributes:
        device: where the model was probed.
        vocab_size: number of token ids.
        head_applies: whether the output head is applied to scored positions alone, outside the model.
        impl: as in `token_log_probs`.
        tree: how sequences are computed as a prefix tree; None for padded rows.
        why_all_logits: why the head is not applied by itself; None where it is.
        why_padded: why prefixes are not shared; None where they are.
        why_own_attention: why the model's own attention runs where there is a faster kernel; else None.
        kernels: what computed attention over the tree of the trial; several where layers differ.
        forked: the classes of layers that pass a state on to each branch of the tree.
        along_paths: the classes of layers that run along each path of the tree.
        why_along_paths: why layers run along paths that could pass a state on; else None.
    """

    device: torch.device
    vocab_size: int
    head_applies: bool
    impl: Impl
    tree: TreeOptions | None = None
    why_all_logits: str | None = None
    why_padded: str | None = None
    why_own_attention: str | None = None
    kernels: frozenset[TreeKernel | StateKernel] = frozenset()
    forked: tuple[str, ...] = ()
    along_paths: tuple[str, ...] = ()
    why_along_paths: str | None = None

    def padded(self, reason: str) -> "Probe":
        """The same, but with padded rows, for a reason."""
        return replace(self, tree=None, why_padded=reason)

    def explain(self) -> str:
        """Which paths are in use and why not the others, in plain words."""
        head = f"all logits are computed, for {self.why_all_logits}"
        if self.head_applies:
            head = "the head is applied to scored positions alone"
        if self.tree is None:
            return f"sequences are padded, for {self.why_padded}; {head}"
        attention = f", by {self.explain_attention()}" if self.kernels & {*KERNEL_NAMES, "model"} else ""
        return "; ".join([f"shared prefixes are computed once{attention}", *self.explain_layers(), head])

    def explain_attention(self) -> str:
        """What computes attention over a tree."""
        attention = "the model's own attention along each path"
        if fast := [name for kernel, name in KERNEL_NAMES.items() if kernel in self.kernels]:
            attention = join_names(fast)
            if "model" in self.kernels:
                attention += " where attention is plain, else by the model's own along each path"
        elif self.why_own_attention is not None:
            attention += f", for {self.why_own_attention}"
        return attention

    def explain_layers(self) -> Iterator[str]:
        """What layers that carry a state do over a tree."""
        if self.forked:
            yield f"its {join_names(self.forked)} layers pass their state on to each branch"
        if self.along_paths:
            reason = "" if self.why_along_paths is None else f" ({self.why_along_paths})"
            yield f"its {join_names(self.along_paths)} layers run along each path{reason}"


def join_names(names: Sequence[str]) -> str:
    """`A`, `A and B`, or `A, B and C`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
