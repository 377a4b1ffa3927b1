"""Floating-point operations of training: those of matrix products, two for each multiplication."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from dpo_wrapper.models import language_model


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one forward pass.

    Attributes:
        per_token: of all layers, for each token that goes into the model.
        per_scored_token: of the output head, for each token that is scored.
        per_attended_pair: of attention, for each token and each token that it attends to.
        trained_share: the share of the layers' weights that train.
        trains_head: whether the output head trains.
    """

    per_token: float
    per_scored_token: float
    per_attended_pair: float
    trained_share: float
    trains_head: bool

    @classmethod
    def of_model(cls, model: nn.Module) -> "ForwardFlops":
        """Counts the weights that a token is multiplied by; of a mixture's experts those that it meets."""
        head = language_model(model).output_head()
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        left_out = embeddings if head is None else {*embeddings, id(head.weight)}
        config: Any = getattr(model, "config", None)
        weights = [p for p in model.parameters() if p.dim() > 1 and id(p) not in left_out]
        total = sum(p.numel() * share_of_experts(config, p.dim()) for p in weights)
        trained = sum(p.numel() * share_of_experts(config, p.dim()) for p in weights if p.requires_grad)
        return cls(
            per_token=2.0 * total,
            per_scored_token=0.0 if head is None else 2.0 * head.weight.numel(),
            per_attended_pair=4.0 * attention_width(model),
            trained_share=trained / max(1, total),
            trains_head=head is not None and head.weight.requires_grad,
        )

    def count(self, tokens: float, scored: float, attended: float, *, has_reference: bool) -> float:
        """Operations of training on so many tokens once: policy, its gradients, and the reference.

        Gradients take one more pass for what flows through the layers, and one for the weights that train.
        """
        reference = 1.0 if has_reference else 0.0
        layers = self.per_token * tokens * (2 + self.trained_share + reference)
        head = self.per_scored_token * scored * (2 + self.trains_head + reference)
        return layers + head + self.per_attended_pair * attended * (3 + reference)


def share_of_experts(config: Any, num_dims: int) -> float:
    """The share of a weight that a token is multiplied by: weights of all experts have three dimensions."""
    if num_dims < 3 or config is None:
        return 1.0
    counts = [
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    ]
    num_experts = next((count for count in counts if count), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / num_experts if num_experts and chosen else 1.0


def attention_width(model: nn.Module) -> int:
    """The widths of the queries of all layers together; 0 where they are not known."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "num_attention_heads"):
        text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return text.num_hidden_layers * text.num_attention_heads * width
    queries = (getattr(module, "to_q", None) for module in model.modules())
    return sum(query.out_features for query in queries if isinstance(query, nn.Linear))
