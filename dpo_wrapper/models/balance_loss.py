"""The loss that balances the experts of a mixture, as the model's family in transformers defines it."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class BalanceLoss:
    """The `aux_loss` of one forward pass, for which it is given the router logits of all layers.

    For each expert the share of all choices that fall on it, times its mean probability, summed over experts
    and times their number (Fedus 2021, "Switch Transformers", arXiv 2101.03961, eq. 4 to 6). `inner` is a
    causal LM of transformers for which `why_no_loss` gives None.
    """

    def __init__(self, inner: nn.Module, text_config: Any) -> None:
        function = find_function(inner)
        assert function is not None
        self.function = function
        # causal LMs of text have these themselves, multimodal ones in their configuration
        self.num_experts, self.top_k = (
            getattr(inner, name, None) or getattr(text_config, name)
            for name in ("num_experts", "num_experts_per_tok")
        )
        self.router_logits: Sequence[Tensor] = ()

    @staticmethod
    def why_no_loss(inner: nn.Module) -> str | None:
        """Why a model has no such loss, as a part of a sentence; None where it has one."""
        if find_function(inner) is None:
            return f"transformers has none for {type(inner).__name__}"
        recorded = (getattr(module, "_can_record_outputs", None) or {} for module in inner.modules())
        if any("router_logits" in names for names in recorded):
            return None
        return f"{type(inner).__name__} does not give its router logits"

    def compute(self, counts: Float[Tensor, "r w"], output: Tensor) -> Float[Tensor, ""]:
        """The loss of the tokens of the pass, each of which counts so many times; padding counts 0 times.

        `output` is what the pass has given. ValueError where router logits are missing or without gradients.
        """
        if not self.router_logits:
            raise ValueError(
                "the model should give router logits, but no layer does: use router_aux_loss_coef = 0."
            )
        has_grad = [logits.requires_grad for logits in (*self.router_logits, output)]
        if has_grad != sorted(has_grad) or has_grad[-2:] == [False, True]:  # the deeper, the more trains
            raise ValueError(
                "the router logits should have gradients, but they have none: checkpoint activations with "
                "use_reentrant = False, or use router_aux_loss_coef = 0."
            )
        # what is a mask for transformers may be any weight of the tokens
        loss: Tensor = self.function(tuple(self.router_logits), self.num_experts, self.top_k, counts)
        return loss


def find_function(inner: nn.Module) -> Callable[..., Tensor] | None:
    """The function of the model's family, from the file of its class; None where there is no such one."""
    for base in type(inner).__mro__:
        function = getattr(sys.modules.get(base.__module__), "load_balancing_loss_func", None)
        if function is not None:
            names = list(inspect.signature(function).parameters)
            expected = ["gate_logits", "num_experts", "top_k", "attention_mask"]
            return function if names == expected else None
    return None
