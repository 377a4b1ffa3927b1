"""Language models of every family behind one interface: logits, hidden states, output head, prefix trees."""

from dpo_wrapper.models.base import LanguageModel, OutputHead
from dpo_wrapper.models.families import language_model

__all__ = ["LanguageModel", "OutputHead", "language_model"]
