"""Modes and dtypes of models: train and eval mode, autocast, `DPO.to(dtype)`."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from dpo_wrapper import DPO, UnpairedBatch
from dpo_wrapper.losses import KTO
from dpo_wrapper.models.eval_mode import eval_mode, hold_modes
from dpo_wrapper.prefix_tree import cpu_attention
from helpers.dpo_calls import LN2, nudged
from helpers.kernels import tree_kernels
from helpers.marks import mark_slow_except
from helpers.models import ZOO
from helpers.naive_dpo import ARGUMENTS, reference_log_probs, train
from helpers.shareable_models import SHAREABLE


@pytest.mark.parametrize(
    "name, dtype",
    mark_slow_except(
        [
            ("xt-tied", torch.float64),
            ("xt-rotary", torch.bfloat16),
            ("hf-llama", torch.float16),
            ("hf-llama", torch.bfloat16),
            ("plain-transformer", torch.bfloat16),
        ],
        product(
            ["xt-tied", "xt-rotary", "hf-llama", "hf-gemma2", "plain-transformer"],
            [torch.float64, torch.float16, torch.bfloat16],
        ),
    ),
)
def test_a_dpo_changes_its_dtype_as_a_whole(name, dtype):
    dpo = DPO(ZOO[name](0))
    dpo(**ARGUMENTS)
    loss = dpo.to(dtype)(**ARGUMENTS)
    assert abs(loss.item() - LN2) < 1e-6
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    before = reference_log_probs(dpo)
    nudged(dpo.policy_model, 0.05)
    assert reference_log_probs(dpo) == before
    # the margins of three pairs may cancel in the loss (in bfloat16 a rounding of the attention decides);
    # the log-probs of a side, by 0.1 nats or more, show that the policy is not the reference
    metrics = dpo(**ARGUMENTS, return_metrics=True)[1]
    assert max(abs(metrics["rewards/chosen"]), abs(metrics["rewards/rejected"])) > 0.01  # beta = 0.1


@pytest.mark.parametrize("name", ["xt-rotary", "hf-llama", "plain-transformer", "plain-tied"])
def test_the_first_step_under_autocast_trains_what_later_ones_do(name):
    """The first look makes no casts of weights that the step would then use without gradients."""
    dpo = DPO(ZOO[name](0))
    steps = []
    for _ in range(2):
        dpo.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = dpo(**ARGUMENTS)
        loss.backward()
        assert loss.dtype == torch.float32 and abs(loss.item() - LN2) < 1e-6
        steps.append({name: p.grad for name, p in dpo.policy_model.named_parameters()})
    for name, gradient in steps[0].items():
        assert gradient is not None and torch.equal(gradient, steps[1][name]), name


@pytest.mark.parametrize("is_first", [True, False], ids=["from the first call", "after one in float32"])
def test_norms_in_float32_beside_values_in_bfloat16(is_first, monkeypatch):
    """Qwen3's queries and keys are float32 under autocast, its values bfloat16: kernels want one dtype."""
    monkeypatch.setattr(cpu_attention, "MIN_BRANCH_NUMEL", 0)
    dpo = DPO(SHAREABLE["qwen3"](0))
    if not is_first:
        dpo(**ARGUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dpo(**ARGUMENTS)
    loss.backward()
    assert tree_kernels(dpo) == {"branches"} and abs(loss.item() - LN2) < 1e-6


def test_a_kl_estimate_under_autocast_costs_no_gradients():
    dpo = DPO(ZOO["xt-rotary"](0), loss=KTO())
    batch = UnpairedBatch.from_lists([[1, 2], [3]], [[4, 5], [6, 7, 8]], [True, False])
    for _ in range(2):  # the first call also probes the model
        dpo.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = dpo(batch)
        loss.backward()
        assert all(p.grad is not None for p in dpo.policy_model.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_may_come_first(context):
    for name in ("xt-alibi", "xt-xpos", "hf-llama"):  # some of these register buffers on their first run
        dpo = DPO(ZOO[name](0))
        with context():
            assert abs(dpo(**ARGUMENTS).item() - LN2) < 1e-6
        train(dpo, steps=1)


@pytest.mark.parametrize("name", ["xt-dropout", "hf-gpt2", "hf-opt", "plain-transformer"])
def test_train_mode_between_calls_changes_nothing(name):
    dpo = DPO(ZOO[name](0))
    nudged(dpo.policy_model)
    expected = dpo(**ARGUMENTS)
    for module in (dpo.policy_model, dpo.ref_model, dpo):
        module.train()
        assert dpo(**ARGUMENTS) == expected


def test_recurrent_layers_without_dropout_stay_in_train_mode():
    """In eval mode cuDNN gives them no gradients."""
    plain, dropping = torch.nn.GRU(4, 4), torch.nn.LSTM(4, 4, num_layers=2, dropout=0.1)
    model = torch.nn.ModuleList([plain, dropping, torch.nn.Dropout()])
    with eval_mode(model):
        assert [module.training for module in model] == [True, False, False]
    assert all(module.training for module in model)
    plain.eval()
    with eval_mode(model):
        assert plain.training
    assert not plain.training


class WithProperty(nn.Module):
    """Its flag is a property that does more."""

    @property
    def training(self) -> bool:  # type: ignore[override]
        return bool(vars(self)["training"])

    @training.setter
    def training(self, is_training: bool) -> None:
        vars(self)["training"] = is_training
        vars(self)["fast"] = not is_training


class WithSetattr(nn.Module):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training":
            vars(self)["fast"] = not value


@pytest.mark.parametrize("module", [WithProperty(), WithSetattr()], ids=["property", "setattr"])
def test_a_flag_that_does_more_is_set_as_always(module):
    module.train()
    with hold_modes([(module, False)]):
        assert not module.training and module.fast
    assert module.training and not module.fast
