"""The interface to a language model, and the implementation for any module of which nothing is known."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.models.balance_loss import BalanceLoss
from dpo_wrapper.models.lower_layers import DecoderLayer
from dpo_wrapper.prefix_tree import StateKernel, TreeLayout

install_lock = threading.Lock()
"""Held while a library's attention is wrapped, once for the process."""


@dataclass(frozen=True)
class OutputHead:
    """`logits = logit_scale · (hidden @ weightᵀ + bias)`; a softcap c makes it `c · tanh(logits / c)`.

    The fields are named as the arguments of `token_log_probs`.
    """

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, "v"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def compute_logits(self, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


class LanguageModel:
    """Any module that maps `Int[b n]` ids to `Float[b n v]` logits or to an output that has `.logits`.

    No method changes the weights or the modules of `model`, which is as the user gave it.
    """

    name = "module"  # the family's, in messages
    vocab_size: int | None = None  # where it can be told
    max_positions: int | None = None  # where a table of positions bounds the length of sequences
    can_share_prefix = False  # whether `forward_tree` is implemented
    plain_attention_hint = ""  # what makes attention such that a kernel may compute it, in brackets
    has_own_positions = False  # whether its attention may count positions by itself, whatever a tree says
    layer_name = "layer"  # what `decoder_layers` are called, in messages
    recurrent_layers: Sequence[nn.Module] = ()  # those that carry a state along the sequence
    balance_loss: BalanceLoss | None = None  # the loss that balances its experts, where it is needed

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.called_module = model  # in which scoring calls modules

    def forward_logits(self, ids: Int[Tensor, "b n"]) -> Any:
        """Run the model as it is; what it returns is not checked here."""
        output = self.model(ids)
        return getattr(output, "logits", output)

    def forward_hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Run the model without its output head."""
        raise NotImplementedError

    def forward_tree(self, layout: TreeLayout, return_hidden: bool) -> Float[Tensor, "r w _"]:
        """Run the model over the tokens of a prefix tree; returns logits or hidden states.

        Raises PrefixSharingError if the model's attention cannot be run over a tree.
        """
        raise NotImplementedError

    def state_kernels(self) -> list[StateKernel | None]:
        """What may compute layers that carry a state over a tree, the best first; None without such."""
        return [None]

    def layers_along_paths(self, state: StateKernel | None) -> list[nn.Module]:
        """The layers that run along the paths of a tree where `state` is what computes those with a state."""
        return []

    def output_head(self) -> OutputHead | None:
        """The output head; None if it is anything but one linear layer."""
        return None

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers that hidden states pass in turn, the lowest first; none where they cannot be told."""
        return []

    def layers_to_shard(self) -> list[nn.Module]:
        """The modules whose weights FSDP gathers together, each of which is called by itself."""
        return []

    def why_own_forward(self) -> str | None:
        """Why the model has to be called as a whole for its logits, as a part of a sentence; else None."""
        return None

    @property
    def own_aux_loss_coef(self) -> float:
        """By what the model's configuration wants `balance_loss` multiplied; 0 where it asks for none."""
        return 0.0

    def why_no_aux_loss(self) -> str | None:
        """Why `with_balance_loss` is not implemented, as a part of a sentence; None where it is."""
        return f"the {self.name} model is none of transformers"

    def with_balance_loss(self) -> "LanguageModel":
        """The same model for one forward pass, after which `balance_loss` can be computed."""
        raise NotImplementedError

    def why_no_tree(self) -> str | None:
        """Why the model should not run over a tree, as a part of a sentence; None if a trial may decide."""
        return None if self.can_share_prefix else "the attention of a plain module cannot be reached"

    def compiles_attention(self) -> bool:
        """Whether `torch.compile` compiles attention layers, alone or in a larger part of the model."""
        modules = self.called_module.modules()
        compiled = (m for m in modules if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None)
        return any(map(has_attention, compiled))


def has_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer or holds one, by the names of the classes."""
    names = (type(part).__name__.lower() for part in module.modules())
    return any("attention" in name or "attn" in name for name in names)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module calls hooks as well."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def as_output_head(module: object, **options: Any) -> OutputHead | None:
    """The head of a plain linear layer; None for one that is adapted, hooked or replaced."""
    if type(module) is not nn.Linear or has_hooks(module):
        return None
    return OutputHead(module.weight, module.bias, **options)
