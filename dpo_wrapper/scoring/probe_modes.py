"""Whether a model may train in eval mode, in which `DPO` computes it without dropout."""

import torch
from jaxtyping import Int
from torch import Tensor

from dpo_wrapper.models import LanguageModel
from dpo_wrapper.models.eval_mode import train_mode
from dpo_wrapper.models.wrappers import is_sharded
from dpo_wrapper.scoring.probe_tree import differentiated_parameters


class EvalModeCheck:
    """Finds models that do more in eval mode than leave dropout out; made before they run in that mode."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.versions = self.list_versions()

    def list_versions(self) -> list[int]:
        """How often each parameter was written to."""
        return [p._version for p in self.model.model.parameters() if not p.is_inference()]

    def restore_weights(self, ids: Int[Tensor, "b n"]) -> bool:
        """Let a model that changes its weights in eval mode (RWKV-4 scales them) change them back."""
        if self.list_versions() == self.versions:
            return False
        with train_mode(self.model.model), torch.no_grad():
            self.model.forward_logits(ids)
        return True

    def check(self, ids: Int[Tensor, "b n"], needs_grad: bool) -> None:
        """Raise ValueError if the model cannot train in eval mode."""
        reason = "changes its weights there" if self.restore_weights(ids) else None
        if reason is None and needs_grad and not is_sharded(self.model.model):
            reason = self.why_no_backward(ids)
        if reason is not None:
            raise ValueError(
                f"the model should be able to train in eval mode, without dropout, but it {reason}: use "
                "disable_dropout = False."
            )

    def why_no_backward(self, ids: Int[Tensor, "b n"]) -> str | None:
        """Why backward fails in eval mode alone (Reformer asks for train mode); None if it does not."""
        if (error := self.backward_error(ids)) is None:
            return None
        with train_mode(self.model.model):
            fails_anyway = self.backward_error(ids) is not None
        return None if fails_anyway else f"fails in backward there ({type(error).__name__}: {error})"

    def backward_error(self, ids: Int[Tensor, "b n"]) -> Exception | None:
        try:
            with differentiated_parameters(self.model.model, True):
                logits = self.model.forward_logits(ids)
                if logits.requires_grad:
                    logits.float().square().mean().backward()
        except Exception as error:  # whatever a model's code may raise
            return error
        return None
