"""One forward pass of a model: from sequences to the log-prob of each scored token."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from jaxtyping import Float, Int
from torch import Tensor

from dpo_wrapper.batches.sequences import ScoredSequences, ScoredTreeTokens, SequenceLogProbs
from dpo_wrapper.log_probs import FusedLoss, gather_log_probs, log_probs_from_hidden
from dpo_wrapper.models import LanguageModel
from dpo_wrapper.models.eval_mode import reproducible_forward
from dpo_wrapper.models.rerun import run_pass
from dpo_wrapper.prefix_tree import PrefixSharingError, StateKernel
from dpo_wrapper.scoring.fused_loss import fused_loss_of_entries
from dpo_wrapper.scoring.probe import Probe
from dpo_wrapper.validation import describe_type

STATE_KERNELS: frozenset[StateKernel] = frozenset(get_args(StateKernel))
"""What layers with a state note of a pass over a tree, each time."""


def compute_log_probs(
    model: LanguageModel,
    sequences: ScoredSequences,
    probe: Probe,
    extras: Sequence[str] = (),
    fused_loss: FusedLoss | None = None,
    needs_aux_loss: bool = False,
) -> SequenceLogProbs:
    """Log-probs of the sequences, with `extras` as `dpo_wrapper.token_log_probs` names them.

    `fused_loss` is the loss that the log-probs of all scored tokens will go into. With `needs_aux_loss`, the
    loss that balances the model's experts is computed over the inputs of all sequences.
    """
    if needs_aux_loss:
        model = model.with_balance_loss()
    head = model.output_head() if probe.head_applies else None
    if probe.tree is None or not len(sequences.target):
        tree = None
        rows, targets = sequences.row * sequences.ids.shape[1] + sequences.source, sequences.target
    else:
        tree = sequences.as_tree(probe.tree)
        rows, targets = tree.source, tree.target
        if fused_loss is not None:
            on_cpu = sequences.on_cpu.as_tree(probe.tree).entry
            fused_loss = fused_loss_of_entries(fused_loss, tree.entry, on_cpu, len(targets))
    with reproducible_forward(model.model):
        if tree is not None:
            output = model.forward_tree(tree.layout, return_hidden=head is not None)
            if probe.kernels & STATE_KERNELS - tree.layout.kernels:
                raise PrefixSharingError("the code of its layers with a state has been replaced")
        else:
            output = run_pass(model.model, lambda: run_padded(model, sequences.ids, head is not None))
        aux_loss = compute_aux_loss(model, sequences, tree, output) if needs_aux_loss else None
        output = output.flatten(0, 1)
        # a model that is spread over several devices gives hidden states on its last
        device = output.device if head is None else head.weight.device
        rows, targets = rows.to(output.device), targets.to(device)
        if head is None:
            result = gather_log_probs(output, rows, targets, extras)
        else:
            output = output.index_select(0, rows).to(device)
    if head is not None:
        arguments = {"impl": probe.impl, "extras": extras, "fused_loss": fused_loss, **vars(head)}
        result = log_probs_from_hidden(output, targets=targets, **arguments)
    tokens, values = result if extras else (result, {})
    tokens = tokens.to(sequences.ids.device)
    values = {name: value.to(tokens.device) for name, value in values.items()}
    if tree is not None:
        tokens = tokens.index_select(0, tree.entry)
        values = {name: value.index_select(0, tree.entry) for name, value in values.items()}
    return replace(sequences.log_probs(tokens, values), aux_loss=aux_loss)


def compute_aux_loss(
    model: LanguageModel, sequences: ScoredSequences, tree: ScoredTreeTokens | None, output: Tensor
) -> Float[Tensor, ""]:
    """The loss that balances experts, of a forward pass that has given `output`; 0 where no token counts."""
    if not len(sequences.target):
        return output.new_zeros(())
    assert model.balance_loss is not None
    count = sequences.is_input if tree is None else tree.count
    return model.balance_loss.compute(count.float(), output).to(sequences.ids.device)


def run_padded(model: LanguageModel, ids: Int[Tensor, "b n"], return_hidden: bool) -> Float[Tensor, "b n _"]:
    """Hidden states or, checked, logits of padded rows."""
    return model.forward_hidden(ids) if return_hidden else check_logits(model.forward_logits(ids), ids)


def check_logits(logits: object, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
    """What a model has returned for ids, if it is logits; else TypeError or ValueError."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        received = logits.dtype if isinstance(logits, Tensor) else describe_type(logits)
        raise TypeError(
            "the model should return logits, a float tensor or an output with .logits, but it returns "
            f"{received}: give one with a language-model head (AutoModelForCausalLM), or wrap it in one."
        )
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise TypeError(
            f"the model should return logits of shape (b, n, v), for ids of shape {tuple(ids.shape)}, "
            f"but their shape is {tuple(logits.shape)}: wrap it in a module that returns one row for each id."
        )
    if logits.device != ids.device:
        raise ValueError(f"the model's logits are on {logits.device} but the ids on {ids.device}: move one.")
    return logits
