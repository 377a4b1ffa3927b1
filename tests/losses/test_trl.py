"""Values and gradients against TRL 1.16: its trainers' own `compute_loss`, on the same batch and weights."""

import inspect
import re
from functools import partial
from types import SimpleNamespace

import pytest

from dpo_wrapper import DPO, PreferenceBatch, sequence_log_probs
from dpo_wrapper.batches.pair_log_probs import wpo_weights
from dpo_wrapper.batches.sequences import SequenceLogProbs
from dpo_wrapper.losses import BCO, IPO, KTO, NCA, ORPO, SFT, Sigmoid
from helpers.marks import mark_slow_except
from helpers.trl import (
    PAIR,
    build_dpo_trainer,
    build_kto_trainer,
    build_models,
    build_trainer,
    dpo_loss_and_grads,
    inputs_with_labels,
    kto_batch,
    pad_side,
    relative_error,
    trl_loss_and_grads,
    with_gradients,
)
from helpers.trl_losses import CPO_LOSSES, DIVERGENCES, DPO_LOSSES, with_divergence

trl = pytest.importorskip("trl")

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory) -> SimpleNamespace:
    return build_dpo_trainer(tmp_path_factory.mktemp("dpo"))


CASES = [
    (name, options, loss, divergence)
    for name, options, loss in DPO_LOSSES
    for divergence in (DIVERGENCES if hasattr(loss, "divergence") else ["reverse_kl"])
]


FAST = [case for case in CASES if case[-1] == "reverse_kl" or case[0] == "sigmoid"]


@pytest.mark.parametrize("name, options, loss, divergence", mark_slow_except(FAST, CASES), ids=str)
def test_dpo_trainer(dpo_trainer, name, options, loss, divergence):
    expected = trl_loss_and_grads(dpo_trainer, [name], f_divergence_type=divergence, **options)
    found = dpo_loss_and_grads(dpo_trainer.policy, dpo_trainer.reference, with_divergence(loss, divergence))
    assert relative_error(found, expected) <= TOLERANCE


def test_every_loss_of_the_trainer_is_here():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    known = set(re.findall(r'loss_type == "(\w+)"', source))
    assert known == {name for name, _, _ in DPO_LOSSES}


def test_combination(dpo_trainer):
    expected = trl_loss_and_grads(dpo_trainer, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    loss = [(Sigmoid(0.3), 0.8), (BCO(0.3), 0.2), (SFT(), 1.0)]
    found = dpo_loss_and_grads(dpo_trainer.policy, dpo_trainer.reference, loss)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("alpha", mark_slow_except([0.3], [0.0, 0.3, 1.0]))
@pytest.mark.parametrize(
    "name, loss", [("sigmoid", Sigmoid(0.3)), ("ipo", IPO(0.3)), ("sft", SFT()), ("nca_pair", NCA(0.3))]
)
def test_length_desensitized(dpo_trainer, name, loss, alpha):
    expected = trl_loss_and_grads(dpo_trainer, [name], ld_alpha=alpha)
    found = dpo_loss_and_grads(dpo_trainer.policy, dpo_trainer.reference, loss, ld_alpha=alpha)
    assert relative_error(found, expected) <= TOLERANCE


def test_weights_of_pairs_equal_wpo(dpo_trainer):
    """The policy's `log Σ p²` comes from its own logits here."""
    expected = trl_loss_and_grads(dpo_trainer, ["sigmoid"], use_weighting=True)
    (chosen, *chosen_masks), (rejected, *rejected_masks) = pad_side(1), pad_side(2)
    masks = zip(chosen_masks, rejected_masks, strict=True)
    batch = PreferenceBatch.from_padded((chosen, rejected), *masks)
    sequences = batch.sequences
    logits = dpo_trainer.policy(sequences.ids).logits[sequences.row, sequences.source].float()
    log_probs = logits.log_softmax(dim=-1)
    tokens = log_probs.gather(-1, sequences.target[:, None]).squeeze(-1)
    extras = {"log_sum_p2": (2 * log_probs).logsumexp(dim=-1)}
    policy = SequenceLogProbs(sequences.sum_per_sequence(tokens), tokens, extras)
    weights = wpo_weights(sequences, batch.pair_index, policy)
    assert not weights.requires_grad
    found = dpo_loss_and_grads(dpo_trainer.policy, dpo_trainer.reference, Sigmoid(0.3), pair_weights=weights)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("name, loss", [("sigmoid", Sigmoid(0.3)), ("ipo", IPO(0.3))])
def test_wpo(dpo_trainer, name, loss, alpha):
    expected = trl_loss_and_grads(dpo_trainer, [name], use_weighting=True, ld_alpha=alpha)
    found = dpo_loss_and_grads(dpo_trainer.policy, dpo_trainer.reference, loss, alpha, wpo=True)
    assert relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("options, loss", CPO_LOSSES, ids=lambda value: str(value))
def test_cpo_trainer(tmp_path, options, loss):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy, reference = build_models()
    config = partial(CPOConfig, beta=0.3, disable_dropout=True, **options)
    trainer = build_trainer(CPOTrainer, config, tmp_path, policy, PAIR)
    expected = with_gradients(trainer.compute_loss(trainer.model, inputs_with_labels()), policy)
    assert relative_error(dpo_loss_and_grads(policy, reference, loss), expected) <= TOLERANCE


def test_orpo_trainer(tmp_path):
    """TRL's likelihood term is over prompt and completion, so it takes the place of the other here."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, reference = build_models()
    config = partial(ORPOConfig, beta=0.3, disable_dropout=True)
    trainer = build_trainer(ORPOTrainer, config, tmp_path, policy, PAIR)
    expected = with_gradients(trainer.compute_loss(trainer.model, inputs_with_labels()), policy)

    ids, _, real = pad_side(1)
    nll = -sequence_log_probs(policy, ids, real, real).sum() / (real.sum() - len(real))
    orpo, sft = (dpo_loss_and_grads(policy, reference, loss) for loss in (ORPO(0.3), SFT()))
    trl_nll = with_gradients(nll, policy)
    value = orpo[0] - sft[0] + trl_nll[0]
    grads = [a - b + c for a, b, c in zip(orpo[1], sft[1], trl_nll[1], strict=True)]
    assert relative_error((value, grads), expected) <= TOLERANCE


def test_kto_trainer(tmp_path):
    policy, reference = build_models()
    trainer, inputs = build_kto_trainer(tmp_path, policy, reference)
    expected = with_gradients(trainer.compute_loss(trainer.model, inputs), policy)
    dpo = DPO(policy, loss=KTO(0.3, 1.5, 0.5), reference=reference, share_prefix=True)
    assert relative_error(with_gradients(dpo(kto_batch()), policy), expected) <= TOLERANCE
