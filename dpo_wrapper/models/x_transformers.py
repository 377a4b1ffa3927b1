"""Models of lucidrains' x-transformers."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.models.base import (
    LanguageModel,
    OutputHead,
    as_output_head,
    has_hooks,
    patch_lock,
    uses_checkpointing,
)
from dpo_wrapper.prefix_tree import PrefixSharingError, TreeLayout, attend_along_paths, attend_with_kernel
from dpo_wrapper.prefix_tree.attention import make_causal_mask


class XTransformersModel(LanguageModel):
    """A `TransformerWrapper`, alone or as the `.net` of an `AutoregressiveWrapper` or the like."""

    name = "x-transformers"
    can_share_prefix = True

    def __init__(self, model: nn.Module, net: Any) -> None:
        super().__init__(model)
        if net.to_logits is None:
            problem = "the model should have an output head, but it returns embeddings"
            raise TypeError(f"{problem}: leave return_only_embed at False.")
        self.net = net
        self.vocab_size = net.num_tokens
        self.max_positions = getattr(net.pos_emb, "max_seq_len", None)

    def forward_logits(self, ids: Int[Tensor, "b n"]) -> Any:
        return self.net(ids)

    def forward_hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.net(ids, return_embeddings=True)

    def forward_tree(self, layout: TreeLayout, return_hidden: bool) -> Float[Tensor, "r w _"]:
        layers = self.net.attn_layers
        has_rotation = layers.rotary_pos_emb is not None or layers.polar_pos_emb is not None
        takes_positions = isinstance(self.net.pos_emb, nn.Module) or has_rotation
        # with one row, positions have one axis: some of the embeddings take no second
        position = layout.position if len(layout.position) > 1 else layout.position[0]
        pos = position if takes_positions else None
        with attend_over_tree(self.net, layout):
            return self.net(layout.ids, return_embeddings=return_hidden, pos=pos)

    def why_own_forward(self) -> str | None:
        return "hooks are called with the model as a whole" if has_hooks(self.net) else None

    def output_head(self) -> OutputHead | None:
        if self.net.output_is_log_prob:  # a mixture of softmaxes has several heads
            return None
        to_logits = self.net.to_logits
        if hasattr(self.net, "tie_embedding_scale") and not isinstance(to_logits, nn.Module):
            return OutputHead(self.net.token_emb.emb.weight, logit_scale=float(self.net.tie_embedding_scale))
        return as_output_head(to_logits)


@contextmanager
def attend_over_tree(net: Any, layout: TreeLayout) -> Iterator[None]:
    """Patch a `TransformerWrapper` so that, inside this context, its attention runs over a tree."""
    library = sys.modules["x_transformers.x_transformers"]
    rel_pos, compute_bias = net.attn_layers.rel_pos, None
    with patch_lock, ExitStack() as stack:
        if rel_pos is not None:  # the bias is computed for each group of paths, and never for the whole tree
            compute_bias = rel_pos.forward
            no_bias = layout.ids.new_zeros(1, 1, 1)
            for name in ("forward", "forward_custom_pos"):
                stack.enter_context(patched_attribute(rel_pos, name, lambda *_: no_bias))
        for module in net.modules():
            if uses_checkpointing(module):
                raise PrefixSharingError("its layers run again in backward, when the tree is gone")
            if isinstance(module, library.Attention):
                if module.data_dependent_alibi is not None or module.rel_proj_pos_bias is not None:
                    raise PrefixSharingError("its attention has a bias that depends on the data")
                window = None if module.max_attend_past is None else module.max_attend_past + 1
                stack.enter_context(patched_attribute(module, "max_attend_past", None))
                forward = partial(_attend, layout, module.attend, module.attend.forward, window, compute_bias)
                stack.enter_context(patched_attribute(module.attend, "forward", forward))
        yield


@contextmanager
def patched_attribute(holder: object, name: str, value: Any) -> Iterator[None]:
    """Set `holder.name` to a value inside this context, as an attribute of the instance alone."""
    before = {name: vars(holder)[name]} if name in vars(holder) else {}
    vars(holder)[name] = value
    try:
        yield
    finally:
        del vars(holder)[name]
        vars(holder).update(before)


def _attend(
    layout: TreeLayout,
    module: Any,
    forward: Callable[..., Any],
    window: int | None,
    compute_bias: Callable[[int, int], Tensor] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """What `Attend.forward` of the library does, over a tree; `forward` is the method as it was."""
    if k.shape[2] != q.shape[2]:
        raise PrefixSharingError("its attention has memory key/values")
    others = sorted(name for name, value in kwargs.items() if value is not None and name != "causal")
    if others:
        raise PrefixSharingError("its attention takes " + ", ".join(others))
    # beside the output the layers expect an object, of which they fill in what they use
    intermediates = sys.modules["x_transformers.attend"].Intermediates()
    is_changed = module.l2_distance or module.add_zero_kv or (module.dropout and module.training)
    if module.flash and attn_bias is None and not is_changed:  # plain softmax attention
        out = attend_with_kernel(layout, q, k, v, window, module.scale)
        if out is not None:
            return out, intermediates

    def attend_path(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        causal_mask = make_causal_mask(n, window, q.device) if window is not None and n > window else None
        bias = compute_bias(n, n) if attn_bias is not None and compute_bias is not None else None
        return forward(q, k, v, **(kwargs | {"mask": causal_mask, "attn_bias": bias}))[0]

    return attend_along_paths(layout, q, k, v, attend_path), intermediates
