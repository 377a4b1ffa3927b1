"""Values and gradients against TRL 1.16: its trainers' own `compute_loss`, on the same batch and weights."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from dpo_wrapper import DPO, PreferenceBatch, UnpairedBatch, sequence_log_probs
from dpo_wrapper.batches.pair_log_probs import wpo_weights
from dpo_wrapper.batches.sequences import SequenceLogProbs
from dpo_wrapper.losses import (
    AOT,
    BCO,
    CPO,
    EXO,
    IPO,
    KTO,
    NCA,
    ORPO,
    SFT,
    SPPO,
    AlphaDivergence,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    DiscoPOP,
    Divergence,
    ForwardKL,
    Hinge,
    JensenShannon,
    Loss,
    ReferenceFree,
    ReverseKL,
    Robust,
    Sigmoid,
    SigmoidNorm,
    SimPO,
)
from helpers.marks import mark_slow_except
from helpers.ranked_batches import rows_of_ids
from helpers.trl import (
    build_models,
    build_trainer,
    dpo_loss_and_grads,
    pad_side,
    random_ids,
    relative_error,
    trl_loss_and_grads,
    with_gradients,
)

trl = pytest.importorskip("trl")

TOLERANCE = 1e-5
PAIR = {"prompt": "a", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory) -> Iterator[SimpleNamespace]:
    policy, reference = build_models()
    # weighting, so that it can be switched on later
    config = partial(trl.DPOConfig, use_weighting=True, disable_dropout=True)
    folder = tmp_path_factory.mktemp("dpo")
    trainer = build_trainer(trl.DPOTrainer, config, folder, policy, PAIR, ref_model=reference)
    rows = [{"prompt_ids": x, "chosen_ids": y, "rejected_ids": z} for x, y, z in random_ids()]
    inputs = trainer.data_collator(rows)
    yield SimpleNamespace(trainer=trainer, inputs=inputs, policy=policy, reference=reference)


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "js_divergence": JensenShannon(),
    "alpha_divergence": AlphaDivergence(0.5),
}

# TRL's name, its options, the loss
DPO_LOSSES: list[tuple[str, dict, Loss]] = [
    ("sigmoid", {}, Sigmoid(0.3)),
    ("robust", {"label_smoothing": 0.2}, Robust(0.3, 0.2)),
    ("hinge", {}, Hinge(0.3)),
    ("ipo", {}, IPO(0.3)),
    ("sigmoid_norm", {}, SigmoidNorm(0.3)),
    ("exo_pair", {"label_smoothing": 1e-2}, EXO(0.3, 1e-2)),
    ("discopop", {"discopop_tau": 0.2}, DiscoPOP(0.3, tau=0.2)),
    ("nca_pair", {}, NCA(0.3)),
    ("bco_pair", {}, BCO(0.3)),
    ("sppo_hard", {}, SPPO(0.3)),
    ("aot", {"label_smoothing": 0.1}, AOT(0.3, 0.1)),
    ("aot_unpaired", {"label_smoothing": 0.1}, AOTUnpaired(0.3, 0.1)),
    ("apo_zero", {}, APOZero(0.3)),
    ("apo_down", {}, APODown(0.3)),
    ("sft", {}, SFT()),
]
CASES = [
    (name, options, loss, divergence)
    for name, options, loss in DPO_LOSSES
    for divergence in (DIVERGENCES if hasattr(loss, "divergence") else ["reverse_kl"])
]


def with_divergence(loss: Any, divergence: str) -> Loss:
    return replace(loss, divergence=DIVERGENCES[divergence]) if hasattr(loss, "divergence") else loss


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


def inputs_with_labels() -> dict[str, Tensor]:
    """The batch as TRL's trainers without reference want it."""
    inputs = {}
    for side, name in ((1, "chosen"), (2, "rejected")):
        ids, prompt, real = pad_side(side)
        inputs[f"{name}_input_ids"], inputs[f"{name}_attention_mask"] = ids, real.long()
        inputs[f"{name}_labels"] = ids.masked_fill(prompt | ~real, -100)
    return inputs


CPO_LOSSES = [
    ({"cpo_alpha": 0.7, "label_smoothing": 0.1}, CPO(0.3, 0.1, 0.7)),
    ({"cpo_alpha": 0.0}, CPO(0.3, alpha=0.0)),
    ({"cpo_alpha": 0.0}, ReferenceFree(0.3)),
    ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4}, SimPO(0.3, 0.4)),
    ({"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.4, "alpha": 0.25}, AlphaPO(0.3, 0.4, 0.25)),
    ({"loss_type": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 0.4}, [(SimPO(0.3, 0.4), 1.0), (SFT(), 0.5)]),
]


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
    config = partial(
        trl.KTOConfig,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        train_sampling_strategy="sequential",
    )
    row = {"prompt": "a", "completion": "b", "label": True}
    trainer = build_trainer(trl.KTOTrainer, config, tmp_path, policy, row, ref_model=reference)
    prompts, completions, labels = rows_of_ids()
    others = [completions[-1], *completions[:-1]]
    columns = {
        "prompt_ids": prompts,
        "completion_ids": completions,
        "KL_completion_ids": others,
        "label": labels,
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    expected = with_gradients(loss, policy)
    dpo = DPO(policy, loss=KTO(0.3, 1.5, 0.5), reference=reference, share_prefix=True)
    batch = UnpairedBatch.from_lists(prompts, completions, labels, others)
    assert relative_error(with_gradients(dpo(batch), policy), expected) <= TOLERANCE
