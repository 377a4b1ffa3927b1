"""One forward pass of a model: from sequences to the log-prob of each scored token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.log_probs import FusedLoss, Impl, gather_log_probs, token_log_probs
from dpo_wrapper.models import LanguageModel
from dpo_wrapper.models.eval_mode import reproducible_forward
from dpo_wrapper.prefix_tree.layout import TreeOptions
from dpo_wrapper.scoring.fused_loss import merge_shared_tokens
from dpo_wrapper.validation import describe_type

TokenLogProbs = tuple[Tensor, dict[str, Tensor]]
"""The log-prob of each scored token in nats, and its extras by name."""


@dataclass(frozen=True)
class ForwardOptions:
    """Which paths a forward pass takes.

    Attributes:
        tree: how sequences are computed as a prefix tree; None for padded rows.
        head_applies: whether the output head is applied to scored positions alone, outside the model.
        impl: as in `token_log_probs`.
    """

    tree: TreeOptions | None = None
    head_applies: bool = False
    impl: Impl = "auto"


def compute_token_log_probs(
    model: LanguageModel,
    sequences: ScoredSequences,
    options: ForwardOptions,
    extras: Sequence[str] = (),
    fused_loss: FusedLoss | None = None,
) -> TokenLogProbs:
    """The log-prob of each scored token, and its extras, as `dpo_wrapper.token_log_probs` names them.

    `fused_loss` is the loss that the log-probs of all scored tokens will go into.
    """
    if options.tree is None or not len(sequences.target):
        rows = sequences.row * sequences.ids.shape[1] + sequences.source

        def forward_padded(hidden: bool) -> Tensor:
            if hidden:
                return model.forward_hidden(sequences.ids)
            return check_logits(model.forward_logits(sequences.ids), sequences.ids)

        return _gather(model, options, forward_padded, rows, sequences.target, extras, fused_loss)

    tree = sequences.as_tree(options.tree)
    if fused_loss is not None:
        fused_loss = merge_shared_tokens(fused_loss, tree.entry, len(tree.target))

    def forward_tree(hidden: bool) -> Tensor:
        return model.forward_tree(tree.layout, hidden)

    log_probs, values = _gather(model, options, forward_tree, tree.source, tree.target, extras, fused_loss)
    values = {name: value.index_select(0, tree.entry) for name, value in values.items()}
    return log_probs.index_select(0, tree.entry), values


def _gather(
    model: LanguageModel,
    options: ForwardOptions,
    forward: Callable[[bool], Float[Tensor, "r w _"]],
    rows: Int[Tensor, "t"],
    targets: Int[Tensor, "t"],
    extras: Sequence[str],
    fused_loss: FusedLoss | None,
) -> TokenLogProbs:
    """The log-prob of each target under its row of what `forward` returns: hidden states (True) or logits."""
    head = model.output_head()
    with reproducible_forward(model.model):
        if head is None or not options.head_applies:
            result = gather_log_probs(forward(False).flatten(0, 1), rows, targets, extras)
            return result if extras else (result, {})
        hidden = forward(True).flatten(0, 1).index_select(0, rows)
    arguments = {"impl": options.impl, "extras": extras, "fused_loss": fused_loss, **vars(head)}
    result = token_log_probs(hidden, targets=targets, **arguments)
    return result if extras else (result, {})


def check_logits(logits: object, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
    """What a model has returned for ids, if it is logits; else TypeError or ValueError."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        received = logits.dtype if isinstance(logits, Tensor) else describe_type(logits)
        raise TypeError(
            "the model should return logits, a float tensor or an output with .logits, but it returns "
            f"{received}: give one with a language-model head (AutoModelForCausalLM), or wrap it in a module "
            "that returns logits."
        )
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise TypeError(
            f"the model should return logits of shape (b, n, v), for ids of shape {tuple(ids.shape)}, "
            f"but their shape is {tuple(logits.shape)}: wrap it in a module that returns one row for each id."
        )
    if logits.device != ids.device:
        raise ValueError(
            f"the model's logits are on {logits.device} but the ids on {ids.device}: move the model there."
        )
    return logits
