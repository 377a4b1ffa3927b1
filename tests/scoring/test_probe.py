"""What the probe of a model finds: whether its head may be applied alone, and whether it sees ahead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO
from helpers.dpo_calls import LN2
from helpers.models import VOCAB, PlainGRU, seeded
from helpers.naive_dpo import ARGUMENTS


class FakeHuggingFace(PlainGRU):
    """Looks like a Hugging Face model; `change` is applied to the logits of its head."""

    def __init__(self, change: Callable[["FakeHuggingFace", Tensor], Tensor]) -> None:
        super().__init__()
        self.config, self.change = type("Config", (), {})(), change
        self.extra = nn.Parameter(torch.zeros(VOCAB))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    @property
    def base_model(self) -> Callable[..., Any]:
        return lambda input_ids: type("Output", (), {"last_hidden_state": self.rnn(self.embed(input_ids))[0]})

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.change(self, super().forward(input_ids))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda model, logits: logits, None),
        (lambda model, logits: 1.5 * logits, "its head alone gives other logits"),
        (lambda model, logits: logits + model.extra, "its head alone leaves out trained parameters"),
        (lambda model, logits: logits[..., :36], r"its head gives logits of shape \(4, 8, 37\) instead"),
    ],
    ids=["nothing", "scaled", "a bias that starts at 0", "cut"],
)
def test_a_head_is_used_alone_only_if_that_changes_nothing(change, reason):
    with seeded(0):
        dpo = DPO(FakeHuggingFace(change))
    arguments = ARGUMENTS | {k: ARGUMENTS[k] % 36 for k in ("preferred_seq", "unpreferred_seq")}
    if reason is None:
        dpo(**arguments)
    else:
        with pytest.warns(
            UserWarning, match=f"all logits of the Hugging Face model are computed, for {reason}"
        ):
            dpo(**arguments).backward()
        assert reason.endswith("parameters") == bool(dpo.policy_model.extra.grad is not None)
    assert dpo.policy.probe.head_applies == (reason is None)


@pytest.mark.parametrize("masked", [float("-inf"), torch.finfo(torch.float32).min])
def test_tokens_masked_out_of_the_vocabulary_do_not_hide_a_model_that_sees_ahead(masked):
    class MaskedVocabulary(nn.Module):
        def __init__(self, sees_ahead: bool) -> None:
            super().__init__()
            self.inner, self.sees_ahead = PlainGRU(), sees_ahead

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.inner(ids.flip(-1)).flip(-2) if self.sees_ahead else self.inner(ids)
            return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], masked)], dim=-1)

    arguments = ARGUMENTS | {k: ARGUMENTS[k] % 36 for k in ("preferred_seq", "unpreferred_seq")}
    assert abs(DPO(MaskedVocabulary(sees_ahead=False))(**arguments).item() - LN2) < 1e-6
    with pytest.raises(ValueError, match="should be autoregressive, but"):
        DPO(MaskedVocabulary(sees_ahead=True))(**arguments)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_a_model_that_sees_ahead_within_blocks_is_refused(size):
    class Blocks(PlainGRU):
        def forward(self, ids: Tensor) -> Tensor:
            logits = super().forward(ids)
            block = torch.arange(ids.shape[1]) // size
            means = (block[:, None] == block).float() @ self.embed(ids)
            return logits + self.head(means)

    with pytest.raises(ValueError, match="should be autoregressive, but"):
        DPO(Blocks())(**ARGUMENTS)


def test_a_module_that_names_its_parts_as_transformers_does_is_plain():
    class Named(PlainGRU):
        config = None

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    dpo = DPO(Named())
    assert abs(dpo(**ARGUMENTS).item() - LN2) < 1e-6
    assert dpo.policy.language_model.name == "module"


def test_a_model_may_write_into_a_view_of_its_logits():
    """torch 2.13 ends the process where such a view gets a hook before its `grad_fn` is read."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.head(self.embed(ids))
            logits[..., 36:] = -1e4
            return logits

    arguments = ARGUMENTS | {k: ARGUMENTS[k] % 36 for k in ("preferred_seq", "unpreferred_seq")}
    with seeded(0):
        dpo = DPO(Masked())
    loss = dpo(**arguments)
    loss.backward()
    assert abs(loss.item() - LN2) < 1e-6 and dpo.policy_model.head.weight.grad.any()
