"""Models of lucidrains' x-transformers."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.models.base import LanguageModel, OutputHead, as_output_head, has_hooks, install_lock
from dpo_wrapper.models.list_modules import list_modules
from dpo_wrapper.models.lower_layers import DecoderLayer
from dpo_wrapper.models.recurrent import RecurrentTree, install_layer_hook
from dpo_wrapper.models.rerun import attention_tree, may_be_over_tree, run_pass
from dpo_wrapper.models.untraced import untraced
from dpo_wrapper.prefix_tree import (
    PrefixSharingError,
    StateKernel,
    TreeLayout,
    attend_along_paths,
    attend_with_kernel,
    shift_over_tree,
)
from dpo_wrapper.prefix_tree.attention import make_causal_mask


class XTransformersModel(LanguageModel):
    """A `TransformerWrapper`, alone or as the `.net` of an `AutoregressiveWrapper` or the like."""

    name = "x-transformers"
    can_share_prefix = True
    plain_attention_hint = " (attn_flash = True may make it so)"
    layer_name = "block"

    def __init__(self, model: nn.Module, net: Any) -> None:
        super().__init__(model)
        if net.to_logits is None:
            problem = "the model should have an output head, but it returns embeddings"
            raise TypeError(f"{problem}: leave return_only_embed at False.")
        self.net = self.called_module = net
        with install_lock:
            install_hooks()
        self.find_recurrent_layers()
        self.vocab_size = net.num_tokens
        self.max_positions = getattr(net.pos_emb, "max_seq_len", None)

    def find_recurrent_layers(self) -> None:
        """Find the layers that carry a state, which may be new ones, and wrap the hybrid modules."""
        library: Any = sys.modules["x_transformers.x_transformers"]
        modules = list_modules(self.net)
        hybrid = (m.hybrid_module for m in modules if isinstance(m, library.Attention))
        self.hybrid_modules: list[Any] = [module for module in hybrid if module is not None]
        shifts = (m for m in modules if isinstance(m, library.ShiftTokens))
        self.recurrent_layers = [*shifts, *self.hybrid_modules]
        layer_classes: Iterator[Any] = map(type, self.hybrid_modules)
        with install_lock:
            for layer_class in layer_classes:
                install_layer_hook(layer_class)

    def forward_logits(self, ids: Int[Tensor, "b n"]) -> Any:
        return self.net(ids)

    def forward_hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.net(ids, return_embeddings=True)

    def forward_tree(self, layout: TreeLayout, return_hidden: bool) -> Float[Tensor, "r w _"]:
        if self.hybrid_modules:
            self.find_recurrent_layers()
        layers = self.net.attn_layers
        has_rotation = layers.rotary_pos_emb is not None or layers.polar_pos_emb is not None
        takes_positions = isinstance(self.net.pos_emb, nn.Module) or has_rotation
        # with one row, positions have one axis: some of the embeddings take no second
        position = layout.position if len(layout.position) > 1 else layout.position[0]
        pos = position if takes_positions else None
        forward = partial(self.net, layout.ids, return_embeddings=return_hidden, pos=pos)
        along_paths = frozenset(map(id, self.hybrid_modules))
        return run_pass(self.model, forward, as_attention_tree(self.net, layout, along_paths))

    def state_kernels(self) -> list[StateKernel | None]:
        return ["fork"] if self.recurrent_layers else [None]

    def layers_along_paths(self, state: StateKernel | None) -> list[nn.Module]:
        return self.hybrid_modules

    def decoder_layers(self) -> list[DecoderLayer]:
        layers: Any = self.net.attn_layers.layers  # each a list of norms, attention or feed-forward, residual
        return [DecoderLayer(layer, layer[2], {layer[1]: skip_block}) for layer in layers]

    def layers_to_shard(self) -> list[nn.Module]:
        return [layer[1] for layer in self.net.attn_layers.layers]

    def why_own_forward(self) -> str | None:
        return "hooks are called with the model as a whole" if has_hooks(self.net) else None

    def output_head(self) -> OutputHead | None:
        if self.net.output_is_log_prob:  # a mixture of softmaxes has several heads
            return None
        to_logits = self.net.to_logits
        if hasattr(self.net, "tie_embedding_scale") and not isinstance(to_logits, nn.Module):
            return OutputHead(self.net.token_emb.emb.weight, logit_scale=float(self.net.tie_embedding_scale))
        return as_output_head(to_logits)


def skip_block(x: Tensor, *_: Any, return_intermediates: bool = False, **__: Any) -> Any:
    """What is called instead of attention or feed-forward where the output of the residual is known."""
    return (x, sys.modules["x_transformers.attend"].Intermediates()) if return_intermediates else x


@dataclass(frozen=True, kw_only=True)
class AttentionTree(RecurrentTree):
    """What the attention of one model needs to run over a tree.

    Attributes:
        windows: by the id of each `Attend` module of the model, to how many tokens a token attends at most.
        bias: the model's module that computes a bias from positions, if it has one.
    """

    windows: dict[int, int | None]
    bias: Any


def as_attention_tree(net: Any, layout: TreeLayout, along_paths: frozenset[int]) -> AttentionTree:
    """What a `TransformerWrapper` needs; PrefixSharingError where its attention cannot run over a tree."""
    if net.attn_layers.residual_attn:
        raise PrefixSharingError("its attention adds the scores of the layer before")
    windows = {}
    for module in net.modules():
        if isinstance(module, sys.modules["x_transformers.x_transformers"].Attention):
            if module.data_dependent_alibi is not None or module.rel_proj_pos_bias is not None:
                raise PrefixSharingError("its attention has a bias that depends on the data")
            past = vars(module)["max_attend_past"]
            windows[id(module.attend)] = None if past is None else past + 1
    return AttentionTree(layout, along_paths, windows=windows, bias=net.attn_layers.rel_pos)


@cache
def install_hooks() -> None:
    """Wrap the forward methods of the library's attention and its shift of tokens, once for the process.

    While a model runs over a tree they do what is needed there; otherwise, and in all other threads, what
    they always do.
    """
    library: Any = sys.modules["x_transformers.x_transformers"]
    attention_class, attend_class = library.Attention, library.Attend
    forward_attention, forward_attend, shift = attention_class.forward, attend_class.forward, library.shift

    def is_active(attend: Any) -> bool:
        return may_be_over_tree() and is_over_tree(attend)

    @wraps(forward_attention)
    def forward_without_bias(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_active(self.attend) and kwargs.get("rel_pos") is not None:
            # it is computed for each group of paths, and never for the whole tree
            kwargs |= {"rel_pos": lambda *_: x.new_zeros(1, 1, 1), "pos": None}
        return forward_attention(self, x, *args, **kwargs)

    @wraps(forward_attend)
    def forward_over_tree(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_active(self):
            return _attend(self, partial(forward_attend, self), *args, **kwargs)
        return forward_attend(self, *args, **kwargs)

    @wraps(shift)
    def shift_tokens(t: Tensor, amount: int, mask: Tensor | None = None) -> Tensor:
        return _shift(shift, t, amount, mask) if may_be_over_tree() else shift(t, amount, mask)

    def get_max_attend_past(self: Any) -> int | None:  # the library makes a mask of it, as large as the tree
        past = vars(self)["max_attend_past"]
        return None if past is not None and is_active(self.attend) else past

    def set_max_attend_past(self: Any, value: int | None) -> None:
        vars(self)["max_attend_past"] = value

    attention_class.forward = forward_without_bias
    attention_class.max_attend_past = property(get_max_attend_past, set_max_attend_past)
    attend_class.forward = forward_over_tree
    library.shift = shift_tokens


@untraced  # a tree in the trace would have it compiled anew for each tree
def is_over_tree(attend: Any) -> bool:
    """Whether an `Attend` module runs over a tree now."""
    tree = attention_tree()
    return isinstance(tree, AttentionTree) and id(attend) in tree.windows


@untraced
def _shift(shift: Callable[..., Tensor], t: Tensor, amount: int, mask: Tensor | None) -> Tensor:
    """What `shift` of the library does, over a tree."""
    tree = attention_tree()
    if not isinstance(tree, AttentionTree) or amount == 0:
        return shift(t, amount, mask)
    return shift_over_tree(tree.layout, t, amount)


@untraced
def _attend(
    module: Any,
    forward: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """What `Attend.forward` of the library does, over a tree; `forward` is the method as it was."""
    tree = attention_tree()
    layout, window = tree.layout, tree.windows[id(module)]
    if k.shape[2] != q.shape[2]:
        raise PrefixSharingError("its attention has memory key/values")
    others = sorted(name for name, value in kwargs.items() if value is not None and name != "causal")
    if others:
        raise PrefixSharingError("its attention takes " + ", ".join(others))
    # beside the output the layers expect an object, of which they fill in what they use
    intermediates = sys.modules["x_transformers.attend"].Intermediates()
    is_changed = module.l2_distance or module.add_zero_kv or (module.dropout and module.training)
    if module.flash and attn_bias is None and not is_changed:  # plain softmax attention
        g = k.shape[1]  # the library gives its heads those of k and v in turn: 0 1 0 1, for kernels 0 0 1 1
        q_in_order = rearrange(q, "b (r g) n d -> b (g r) n d", g=g)
        out = attend_with_kernel(layout, q_in_order, k, v, window, module.scale)
        if out is not None:
            return rearrange(out, "b (g r) n d -> b (r g) n d", g=g), intermediates

    def attend_path(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        causal_mask = make_causal_mask(n, window, q.device) if window is not None and n > window else None
        bias = None if attn_bias is None or tree.bias is None else tree.bias(n, n)
        return forward(q, k, v, **(kwargs | {"mask": causal_mask, "attn_bias": bias}))[0]

    return attend_along_paths(layout, q, k, v, attend_path), intermediates
