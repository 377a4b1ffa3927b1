"""The lower layers that policy and reference have in common: they are computed once for both."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.models.base import has_hooks
from dpo_wrapper.models.eval_mode import eval_mode
from dpo_wrapper.models.list_modules import list_modules
from dpo_wrapper.models.lower_layers import DecoderLayer, LayerRecord
from dpo_wrapper.models.wrappers import is_sharded
from dpo_wrapper.reference.reference import ModelReference, Reference
from dpo_wrapper.reference.shared_weights import memory_key
from dpo_wrapper.scoring.probe import Probe, ProbeKey
from dpo_wrapper.scoring.probe_head import parameters_reached
from dpo_wrapper.scoring.probe_tree import TreeTrial, describe_error
from dpo_wrapper.scoring.rounding import why_gradients_differ, why_log_probs_differ
from dpo_wrapper.scoring.scorer import Scorer, probing_lock
from dpo_wrapper.scoring.stand_ins import preserved_state, stand_in_parameters
from dpo_wrapper.scoring.token_log_probs import compute_log_probs


class LowerLayers:
    """Has the policy's forward pass start behind the layers that it has in common with the reference.

    These are the lowest layers without trained parameters, adapters and hooks, whose weights are the same
    memory in both. The reference's pass over the same sequences records the hidden states behind them. A
    trial in each state of the policy tells first whether log-probs and gradients are those of a whole pass.

    Attributes:
        policy, reference: the policy's scorer, and the reference.
        disable_dropout: as in `DPO`.
        reasons: by the policy's state, its probe and the number of common layers, why a whole pass is
            needed; None if it is not.
        explanation: how the latest batch was computed, in plain words.
    """

    def __init__(self, policy: Scorer, reference: Reference, disable_dropout: bool) -> None:
        self.policy, self.reference, self.disable_dropout = policy, reference, disable_dropout
        self.reasons: dict[tuple[ProbeKey, Probe, int], str | None] = {}
        self.explanation = ""

    @contextmanager
    def recording(self) -> Iterator[LayerRecord]:
        """Record what the common layers give in the reference's pass, inside this context."""
        record = LayerRecord(*self.common_layers())
        with record.recording():
            yield record

    @contextmanager
    def replaying(self, record: LayerRecord, sequences: ScoredSequences) -> Iterator[None]:
        """Let the policy's pass over the same sequences start from the record, which is freed afterwards."""
        is_equal = record.output is not None and self.gives_equal_results(record, sequences.ids.device)
        try:
            with record.replaying() if is_equal else nullcontext():
                yield
        finally:
            record.output = None

    def explain(self) -> str:
        """How the latest batch was computed, or why no batch can be computed otherwise; may be empty."""
        is_unknown = not self.explanation and isinstance(self.reference, ModelReference)
        if is_unknown and (reason := self.why_not_tried()) is not None:
            return explain_whole_passes(reason)
        return self.explanation

    def common_layers(self) -> tuple[list[DecoderLayer], list[DecoderLayer]]:
        """The common layers as those of the reference and as those of the policy."""
        if not isinstance(self.reference, ModelReference):
            return [], []
        theirs, ours = (s.language_model.decoder_layers() for s in (self.reference.scorer, self.policy))
        count, name = 0, self.policy.language_model.layer_name
        reason: str | None = f"its {name}s are not known"
        for their, our in zip(theirs, ours, strict=False):
            if (reason := why_not_common(our.module, their.module)) is not None:
                reason = f"{name} {count} {reason}"
                break
            count += 1
        if count and self.disable_dropout and not self.policy.aux_loss_coef:
            return theirs[:count], ours[:count]
        if count:
            balance = "the loss that balances experts needs the choices of all layers"
            reason = balance if self.disable_dropout else "dropout may stay on"
        assert reason is not None
        self.explanation = explain_whole_passes(reason)
        return [], []

    def why_not_tried(self) -> str | None:
        """Why layers should not be called one by one, or not in one of the passes alone; None if they may."""
        assert isinstance(self.reference, ModelReference)
        for scorer in (self.policy, self.reference.scorer):
            model = scorer.language_model.model
            if is_sharded(model):
                return "FSDP gathers its layers"
            layers = {id(layer.module) for layer in scorer.language_model.decoder_layers()}
            for module in model.modules():
                is_compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
                if is_compiled and any(id(part) in layers for part in module.modules() if part is not module):
                    return "they are compiled together"
                if "_hf_hook" in vars(module):
                    return "accelerate has spread it over devices"
        return None

    def gives_equal_results(self, record: LayerRecord, device: torch.device) -> bool:
        """Whether a pass that starts from a record gives what a whole one does; new states are tried."""
        assert isinstance(self.reference, ModelReference)
        model, count = self.policy.language_model, len(record.replayed)
        with probing_lock:
            probe, reference_probe = self.policy.find_probe(device), self.reference.scorer.probe
            with torch.enable_grad():  # what trains says, without gradients too, where policies may differ
                key = ProbeKey.of_model(model, device)
            state = (key, probe, count)
            if state not in self.reasons:
                self.reasons[state] = self.why_results_differ(record, probe, key.trains is not None)
        reason = self.reasons[state]
        if reference_probe is None or reference_probe.tree != probe.tree:
            reason = "the two are computed over different trees"
        name, total = model.layer_name, len(model.decoder_layers())
        layers = f"{name} 0 of {total} is" if count == 1 else f"{name}s 0 to {count - 1} of {total} are"
        self.explanation = explain_whole_passes(reason) if reason else f"; {layers} computed once for both"
        return reason is None

    def why_results_differ(self, record: LayerRecord, probe: Probe, needs_grad: bool) -> str | None:
        """Compare short passes of the policy that start from a record of the reference with whole ones."""
        assert isinstance(self.reference, ModelReference)
        if (reason := self.why_not_tried()) is not None:
            return reason
        model = self.policy.language_model
        trial = TreeTrial(model, probe, needs_grad)
        sequences = trial.sequences().prebuild_tree(probe.tree).to(probe.device)
        lower = LayerRecord(record.recorded, record.replayed)
        try:
            with (
                torch.inference_mode(False),
                preserved_state(model.model, probe.device),
                stand_in_parameters(model.model, replaces_frozen=False),
            ):
                with eval_mode(model.model):
                    if self.trains_below(record, sequences, probe):
                        return "what is below them trains"
                    tokens, gradients = trial.run(sequences, probe)
                with lower.recording():
                    self.reference.compute(sequences)
                with eval_mode(model.model), lower.replaying():
                    replayed_tokens, replayed_gradients = trial.run(sequences, probe)
        except Exception as error:  # whatever a model's code may raise, whole passes remain
            return describe_error(error)
        finally:
            torch.clear_autocast_cache()
        reason = why_log_probs_differ(replayed_tokens, tokens, trial.dtype)
        return reason or why_gradients_differ(replayed_gradients, gradients, trial.dtype)

    def trains_below(self, record: LayerRecord, sequences: ScoredSequences, probe: Probe) -> bool:
        """Whether the common layers' output depends on parameters that train (embeddings, prompts)."""
        model = self.policy.language_model
        whole = LayerRecord(record.replayed, ())
        with torch.enable_grad(), whole.recording():
            compute_log_probs(model, sequences, probe)
        output = whole.output if isinstance(whole.output, tuple) else (whole.output,)
        reached = set().union(*(parameters_reached(x) for x in output if isinstance(x, Tensor)))
        return any(p.requires_grad and id(p) in reached for p in model.model.parameters())


def explain_whole_passes(reason: str) -> str:
    return f"; no layer is computed for both at once, for {reason}"


def why_not_common(ours: nn.Module, theirs: nn.Module) -> str | None:
    """Why a layer of the policy and one of the reference are to be computed apart; None if they may not.

    This runs in each step, so it reads attributes alone.
    """
    our_modules = list_modules(ours)
    their_modules = our_modules if theirs is ours else list_modules(theirs)
    modules = our_modules if theirs is ours else our_modules + their_modules
    classes: set[Any] = set(map(type, modules))
    if any(module_class.__module__.startswith("peft.") for module_class in classes):
        return "has an adapter"
    if any(map(has_hooks, modules)):
        return "has hooks"
    our_parameters, their_parameters = map(list_parameters, (our_modules, their_modules))
    if any(p.requires_grad for p in our_parameters):
        return "trains"
    pairs = zip_longest(our_parameters, their_parameters)
    if any(p is not q and (p is None or q is None or memory_key(p) != memory_key(q)) for p, q in pairs):
        return "has other weights in the reference"
    return None


def list_parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module._parameters.values() if p is not None]
