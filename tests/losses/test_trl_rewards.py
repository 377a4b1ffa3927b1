"""Rewards, margins and accuracies against those that TRL 1.16 logs, on the same batch and weights."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO
from dpo_wrapper.losses import IPO, KTO, ORPO, SFT, Hinge, Sigmoid, SigmoidNorm, SimPO
from helpers.marks import mark_slow_except
from helpers.trl import (
    LENGTHS,
    PAIR,
    build_dpo_trainer,
    build_kto_trainer,
    build_models,
    build_trainer,
    inputs_with_labels,
    kto_batch,
    pad_side,
    random_ids,
    trl_loss,
)
from helpers.trl_losses import CPO_LOSSES, DIVERGENCES, DPO_LOSSES, with_divergence

pytest.importorskip("trl")

NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
PER_TOKEN = (IPO, SigmoidNorm)
"""Losses of means over tokens, of which TRL's DPOTrainer logs the rewards of sums."""


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory) -> SimpleNamespace:
    return build_dpo_trainer(tmp_path_factory.mktemp("dpo"))


def trl_metrics(setup: SimpleNamespace, types: list[str], weights=None, **options) -> dict[str, float]:
    """What TRL's DPOTrainer logs of one batch."""
    setup.trainer._metrics["eval"].clear()
    with torch.no_grad():
        trl_loss(setup, types, weights, **options)
    return {name: values[-1] for name, values in setup.trainer._metrics["eval"].items()}


@torch.no_grad()
def dpo_metrics(policy: nn.Module, loss: Any, **options) -> dict[str, float]:
    """Ours of the same batch."""
    (chosen, *chosen_masks), (rejected, *rejected_masks) = pad_side(1), pad_side(2)
    masks = zip(chosen_masks, rejected_masks, strict=True)
    ref_log_probs = options.pop("ref_log_probs", None)
    dpo = DPO(policy, loss=loss, **options)
    metrics = dpo(chosen, rejected, *masks, ref_log_probs=ref_log_probs, return_metrics=True)[1]
    return {name: value.item() for name, value in metrics.items()}


def assert_same_rewards(found: dict[str, float], expected: dict[str, float]) -> None:
    for name in NAMES:
        assert found[name] == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-6), name


def cases_of_sums() -> list[tuple[str, dict, Any, str]]:
    cases = []
    for name, options, loss in DPO_LOSSES:
        if not isinstance(loss, (*PER_TOKEN, SFT)):
            for divergence in DIVERGENCES if hasattr(loss, "divergence") else ["reverse_kl"]:
                cases.append((name, options, loss, divergence))
    return cases


CASES = cases_of_sums()
FAST = [case for case in CASES if case[-1] == "reverse_kl" or case[0] == "sigmoid"]


@pytest.mark.parametrize("name, options, loss, divergence", mark_slow_except(FAST, CASES), ids=str)
def test_dpo_trainer(dpo_trainer, name, options, loss, divergence):
    expected = trl_metrics(dpo_trainer, [name], f_divergence_type=divergence, **options)
    loss = with_divergence(loss, divergence)
    assert_same_rewards(dpo_metrics(dpo_trainer.policy, loss, reference=dpo_trainer.reference), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_length_desensitized(dpo_trainer, alpha):
    expected = trl_metrics(dpo_trainer, ["sigmoid"], ld_alpha=alpha)
    options = {"reference": dpo_trainer.reference, "ld_alpha": alpha}
    assert_same_rewards(dpo_metrics(dpo_trainer.policy, Sigmoid(0.3), **options), expected)


@pytest.mark.parametrize("first", [Sigmoid(0.3), SFT()], ids=repr)
def test_a_sum_has_the_rewards_of_its_first_loss_that_has_any(dpo_trainer, first):
    expected = trl_metrics(dpo_trainer, ["sigmoid", "sft"], [0.8, 1.0])
    second = SFT() if isinstance(first, Sigmoid) else Sigmoid(0.3)
    terms = [(first, 1.0), (second, 0.8), (SimPO(), 0.1)]
    assert_same_rewards(dpo_metrics(dpo_trainer.policy, terms, reference=dpo_trainer.reference), expected)


@pytest.mark.parametrize("name, loss", [("ipo", IPO(0.3)), ("sigmoid_norm", SigmoidNorm(0.3))])
def test_losses_per_token_divide_the_rewards_of_the_dpo_trainer(dpo_trainer, name, loss):
    """TRL logs `βa` and `βb` for these too; we log `βa / n_w` and `βb / n_l`, which they compare."""
    chosen, rejected = [], []
    for (x, y, z), (_, n_w, n_l) in zip(random_ids(), LENGTHS, strict=True):
        row = {"prompt_ids": x, "chosen_ids": y, "rejected_ids": z}
        setup = SimpleNamespace(trainer=dpo_trainer.trainer, inputs=dpo_trainer.trainer.data_collator([row]))
        logged = trl_metrics(setup, [name])
        chosen.append(logged["rewards/chosen"] / n_w)
        rejected.append(logged["rewards/rejected"] / n_l)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    columns = (chosen, rejected, margins, [margin > 0 for margin in margins])
    expected = {name: sum(column) / len(column) for name, column in zip(NAMES, columns, strict=True)}
    assert_same_rewards(dpo_metrics(dpo_trainer.policy, loss, reference=dpo_trainer.reference), expected)


@pytest.mark.parametrize("options, loss", CPO_LOSSES, ids=str)
def test_cpo_trainer(tmp_path, options, loss):
    policy, _ = build_models()
    expected = cpo_trainer_metrics(tmp_path, policy, options)
    assert_same_rewards(dpo_metrics(policy, loss), expected)


@pytest.mark.parametrize("name, loss", [("ipo", IPO(0.3)), ("hinge", Hinge(0.3))])
def test_cpo_trainer_without_a_reference_is_a_reference_of_zeros(tmp_path, name, loss):
    """Here TRL logs rewards per token for IPO, unlike in its DPOTrainer."""
    policy, _ = build_models()
    expected = cpo_trainer_metrics(tmp_path, policy, {"loss_type": name, "cpo_alpha": 0.0})
    zeros = torch.zeros(len(LENGTHS))
    assert_same_rewards(dpo_metrics(policy, loss, ref_log_probs=(zeros, zeros)), expected)


def cpo_trainer_metrics(folder, policy: nn.Module, options: dict) -> dict[str, Any]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = partial(CPOConfig, beta=0.3, disable_dropout=True, **options)
    return stored_metrics(build_trainer(CPOTrainer, config, folder, policy, PAIR), inputs_with_labels())


@torch.no_grad()
def stored_metrics(trainer: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    trainer.compute_loss(trainer.model, inputs)
    return {name: values[-1] for name, values in trainer._stored_metrics["train"].items()}


def test_orpo_trainer(tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, _ = build_models()
    config = partial(ORPOConfig, beta=0.3, disable_dropout=True)
    trainer = build_trainer(ORPOTrainer, config, tmp_path, policy, PAIR)
    assert_same_rewards(dpo_metrics(policy, ORPO(0.3)), stored_metrics(trainer, inputs_with_labels()))


@torch.no_grad()
def test_kto_trainer(tmp_path):
    """TRL logs no accuracy there."""
    policy, reference = build_models()
    trainer, inputs = build_kto_trainer(tmp_path, policy, reference)
    trainer.compute_loss(trainer.model, inputs)
    found = DPO(policy, loss=KTO(0.3, 1.5, 0.5), reference=reference)(kto_batch(), return_metrics=True)[1]
    for name in (*NAMES[:3], "kl"):
        expected = trainer._metrics["eval"][name][-1]
        assert found[name].item() == pytest.approx(expected, rel=1e-5, abs=1e-6), name
