"""Values and gradients against TRL 1.16: its trainers' own `compute_loss`, on the same batch and weights."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from torch import Tensor, nn

from dpo_wrapper import PreferenceBatch, sequence_log_probs
from dpo_wrapper.batches.token_level import wpo_weights
from dpo_wrapper.losses import (
    AOT,
    BCO,
    CPO,
    EXO,
    IPO,
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
from helpers.trl import difference, differentiated, models, ours, padded, theirs, tokenizer, tokens

trl = pytest.importorskip("trl")

TOLERANCE = 1e-5
"""Tokens of prompt, chosen and rejected."""


def trainer(kind: type, config: type, tmp_path, policy: nn.Module, row: dict, **kwargs):
    from datasets import Dataset

    arguments = config(
        output_dir=str(tmp_path),
        max_length=None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_dropout=True,
    )
    return kind(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer(),
        **kwargs,
    )


PAIR = {"prompt": "a", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory) -> Iterator[SimpleNamespace]:
    policy, reference = models()
    config = partial(trl.DPOConfig, use_weighting=True)  # so that it can be switched on later
    made = trainer(trl.DPOTrainer, config, tmp_path_factory.mktemp("dpo"), policy, PAIR, ref_model=reference)
    made.model.eval()
    rows = [{"prompt_ids": x, "chosen_ids": y, "rejected_ids": z} for x, y, z in tokens()]
    yield SimpleNamespace(trainer=made, inputs=made.data_collator(rows), policy=policy, reference=reference)


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


def with_divergence(loss: Loss, divergence: str) -> Loss:
    return replace(loss, divergence=DIVERGENCES[divergence]) if hasattr(loss, "divergence") else loss


@pytest.mark.parametrize("name, options, loss, divergence", CASES, ids=lambda value: str(value))
def test_dpo_trainer(dpo_trainer, name, options, loss, divergence):
    expected = theirs(dpo_trainer, [name], f_divergence_type=divergence, **options)
    found = ours(dpo_trainer.policy, dpo_trainer.reference, with_divergence(loss, divergence))
    assert difference(found, expected) <= TOLERANCE


def test_every_loss_of_the_trainer_is_here():
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    known = set(re.findall(r'loss_type == "(\w+)"', source))
    assert known == {name for name, _, _ in DPO_LOSSES}


def test_combination(dpo_trainer):
    expected = theirs(dpo_trainer, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    loss = [(Sigmoid(0.3), 0.8), (BCO(0.3), 0.2), (SFT(), 1.0)]
    assert difference(ours(dpo_trainer.policy, dpo_trainer.reference, loss), expected) <= TOLERANCE


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "name, loss", [("sigmoid", Sigmoid(0.3)), ("ipo", IPO(0.3)), ("sft", SFT()), ("nca_pair", NCA(0.3))]
)
def test_length_desensitized(dpo_trainer, name, loss, alpha):
    expected = theirs(dpo_trainer, [name], ld_alpha=alpha)
    found = ours(dpo_trainer.policy, dpo_trainer.reference, loss, ld_alpha=alpha)
    assert difference(found, expected) <= TOLERANCE


def test_wpo_weights(dpo_trainer):
    """The policy's `log Σ p²` comes from its own logits here."""
    expected = theirs(dpo_trainer, ["sigmoid"], use_weighting=True)
    chosen, rejected = (padded(side, tokens()) for side in (1, 2))
    masks = [(chosen[k], rejected[k]) for k in (1, 2)]
    batch = PreferenceBatch.from_padded((chosen[0], rejected[0]), *masks)
    sequences = batch.sequences
    logits = dpo_trainer.policy(sequences.ids).logits[sequences.row, sequences.source].float()
    log_probs = logits.log_softmax(dim=-1)
    scores = log_probs.gather(-1, sequences.target[:, None]).squeeze(-1)
    weights = wpo_weights(batch, scores, (2 * log_probs).logsumexp(dim=-1))
    assert not weights.requires_grad
    found = ours(dpo_trainer.policy, dpo_trainer.reference, Sigmoid(0.3), pair_weights=weights)
    assert difference(found, expected) <= TOLERANCE


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("name, loss", [("sigmoid", Sigmoid(0.3)), ("ipo", IPO(0.3))])
def test_wpo(dpo_trainer, name, loss, alpha):
    expected = theirs(dpo_trainer, [name], use_weighting=True, ld_alpha=alpha)
    found = ours(dpo_trainer.policy, dpo_trainer.reference, loss, alpha, wpo=True)
    assert difference(found, expected) <= TOLERANCE


def labelled() -> dict[str, Tensor]:
    """The batch as TRL's trainers without reference want it."""
    inputs = {}
    for side, name in ((1, "chosen"), (2, "rejected")):
        ids, prompt, real = padded(side, tokens())
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

    policy, reference = models()
    made = trainer(CPOTrainer, partial(CPOConfig, beta=0.3, **options), tmp_path, policy, PAIR)
    made.model.eval()
    expected = differentiated(made.compute_loss(made.model, labelled()), policy)
    assert difference(ours(policy, reference, loss), expected) <= TOLERANCE


def test_orpo_trainer(tmp_path):
    """TRL's likelihood term is over prompt and completion."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, reference = models()
    made = trainer(ORPOTrainer, partial(ORPOConfig, beta=0.3), tmp_path, policy, PAIR)
    made.model.eval()
    expected = differentiated(made.compute_loss(made.model, labelled()), policy)
    assert difference(ours(policy, reference, ORPO(0.3, prompt=True)), expected) <= TOLERANCE

    # and without the prompt: the other likelihood in its place
    ids, _, real = padded(1, tokens())
    whole = -sequence_log_probs(policy, ids, real, real).sum() / (real.sum() - len(real))
    parts = [
        ours(policy, reference, ORPO(0.3)),
        ours(policy, reference, SFT()),
        differentiated(whole, policy),
    ]
    value = parts[0][0] - parts[1][0] + parts[2][0]
    gradient = [a - b + c for a, b, c in zip(*(part[1] for part in parts), strict=True)]
    assert difference((value, gradient), expected) <= TOLERANCE
