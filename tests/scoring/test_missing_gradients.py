"""Parameters that train but get no gradient are named, with what to do; weights of several dtypes as well."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_wrapper import DPO
from helpers.adapters import lora
from helpers.marks import mark_slow_except
from helpers.models import VOCAB, ZOO, PlainGRU, hf_llama
from helpers.naive_dpo import ARGUMENTS

MESSAGE = "parameters that train should get gradients, but"


def warnings_of(dpo: DPO, calls: int = 2) -> list[str]:
    """What is said of gradients in the first calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            dpo(**ARGUMENTS).backward()
    return [str(w.message) for w in caught if MESSAGE in str(w.message)]


class ExpertsInEval(PlainGRU):
    """As in DeepSeek's own code: in eval mode its experts compute without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.unused_expert = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            expert = self.expert(hidden)
        return self.head(self.rnn(hidden + expert)[0])


def test_experts_without_gradients_in_eval_mode_are_named():
    (message,) = warnings_of(DPO(ExpertsInEval()))
    assert "2 of the module model get none (expert.bias, expert.weight)" in message
    assert message.endswith("use disable_dropout = False.")
    dpo = DPO(ExpertsInEval().train(), disable_dropout=False)
    assert not warnings_of(dpo)
    assert dpo.policy_model.expert.weight.grad is not None


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_without_gradients_of_the_input_is_named():
    def checkpointed(has_input_grads: bool) -> DPO:
        policy = lora(hf_llama(0), modules_to_save=["lm_head"]).train()
        policy.gradient_checkpointing_enable({"use_reentrant": True})
        policy.enable_input_require_grads()
        if not has_input_grads:  # transformers 5 enables them by itself, earlier ones do not
            policy.get_input_embeddings()._forward_hooks.clear()
        return DPO(policy)

    (message,) = warnings_of(checkpointed(False))
    assert "8 of the Hugging Face model get none" in message
    assert message.endswith("call model.enable_input_require_grads().")
    assert not warnings_of(checkpointed(True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    mark_slow_except(
        ["xt-tied", "xt-alibi", "xt-mixture", "hf-llama", "hf-gemma2", "plain-transformer", "plain-gru"], ZOO
    ),
)
def test_nothing_is_said_where_all_gradients_arrive(name):
    assert not warnings_of(DPO(ZOO[name](0)), calls=1)


@pytest.mark.parametrize("make", [hf_llama, partial(hf_llama, tie_word_embeddings=True)])
def test_weights_of_several_dtypes_without_autocast_are_named(make):
    policy = make(0)
    for name, p in policy.named_parameters():
        if "norm" not in name:
            p.data = p.data.bfloat16()
    dpo = DPO(policy, share_prefix=False)
    one_of_two = "of one dtype, but they are torch.bfloat16 and torch.float32: call DPO under torch.autocast"
    with pytest.raises(TypeError, match=one_of_two):
        dpo(**ARGUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert dpo(**ARGUMENTS).isfinite()


@pytest.mark.parametrize(("asks_for_it", "coef"), [(True, None), (True, 0.0), (False, None)])
def test_a_balance_loss_that_cannot_be_added_is_named(asks_for_it, coef):
    policy = hf_llama(0, router_aux_loss_coef=0.5, output_router_logits=asks_for_it)
    dpo = DPO(policy, router_aux_loss_coef=coef)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            dpo(**ARGUMENTS)
    told = [str(w.message) for w in caught if "balances experts" in str(w.message)]
    assert len(told) == (asks_for_it and coef is None)
    assert all("router_aux_loss_coef = 0.5), but it is left out" in message for message in told)


# the head's bias, in whatever mode the model was looked at first


class BiasedLlama(nn.Module):
    """A head with a bias of zeros beside it, which its own linear layer does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = hf_llama(0)
        self.extra = nn.Parameter(torch.zeros(VOCAB))
        self.config = self.inner.config

    @property
    def base_model(self) -> nn.Module:
        return self.inner.model

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        output = self.inner(input_ids, **kwargs)
        output.logits = output.logits + self.extra
        return output


@pytest.mark.filterwarnings("ignore:all logits", "ignore:prefixes are not shared")
@pytest.mark.parametrize("first", ["inference", "no_grad", "frozen"])
def test_a_bias_trains_whatever_the_first_call_was(first):
    dpo = DPO(BiasedLlama())
    if first == "frozen":
        dpo.policy_model.extra.requires_grad_(False)
        dpo(**ARGUMENTS)
        dpo.policy_model.extra.requires_grad_(True)
    else:
        with torch.inference_mode() if first == "inference" else torch.no_grad():
            dpo(**ARGUMENTS)
    dpo(**ARGUMENTS).backward()
    assert dpo.policy_model.extra.grad is not None and dpo.policy_model.extra.grad.any()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_reference_that_reads_the_policy_is_refused_in_any_mode(mode):
    class Follower(nn.Module):
        def __init__(self, policy: PlainGRU) -> None:
            super().__init__()
            self.read = lambda ids: F.linear(policy.embed(ids), policy.head.weight)

        def forward(self, ids: Tensor) -> Tensor:
            return self.read(ids)

    policy = PlainGRU()
    dpo = DPO(policy, reference=Follower(policy))
    with mode(), pytest.raises(ValueError, match="should not depend on parameters that train"):
        dpo(**ARGUMENTS)
