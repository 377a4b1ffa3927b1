"""A reference that follows the policy, by hand; each kind of reference survives what is done to it."""

import copy
import pickle

import pytest
import torch
from torch import Generator

from dpo_wrapper import DPO, CachedReference, SimPO, precompute_ref_log_probs
from dpo_wrapper.data import scored_sequences
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from helpers.adapters import lora
from helpers.batches import random_batch
from helpers.datasets import pairs
from helpers.dpo_calls import arguments
from helpers.marks import mark_slow_except
from helpers.models import ZOO
from helpers.runs import BUNDLED, SMALL_DECODER, interrupt_training, make_config, read_metrics

LN2 = 0.6931471805599453
CASE = random_batch(Generator().manual_seed(0), odd=0)


def moved(dpo, scale=0.1):
    with torch.no_grad():
        for p in dpo.policy_model.parameters():
            if p.requires_grad:
                p += scale * torch.randn_like(p)
    return dpo


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def metric(dpo, name="logps/ref_chosen"):
    return dpo(**arguments(CASE), return_metrics=True)[1][name]


@pytest.mark.parametrize("name", ["xt-tied", "hf-llama-tied", "plain-tied"])
@pytest.mark.parametrize("alpha", [0.6, 0.25, 1.0])
def test_values_by_hand(name, alpha):
    dpo = moved(DPO(ZOO[name](0), cache_ref_log_probs=True))
    before, policy, remembered = weights(dpo.ref_model), weights(dpo.policy_model), metric(dpo)
    dpo.sync_reference(alpha)
    after = dpo.ref_model.state_dict()
    for key, value in after.items():
        expected = alpha * policy[key] + (1 - alpha) * before[key]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(value, policy[key]) or alpha < 1
    assert all(torch.equal(value, policy[key]) for key, value in dpo.policy_model.state_dict().items())
    assert metric(dpo) != remembered, "what was remembered is of the reference as it was"
    if alpha == 1:
        assert abs(dpo(**arguments(CASE)) - LN2) < 1e-6
    assert not any(p.requires_grad for p in dpo.ref_model.parameters())


def test_shared_weights_and_buffers():
    model = ZOO["hf-llama"](0)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.register_buffer("mean", torch.tensor([1.0, 2.0]))
    model.register_buffer("count", torch.tensor(3))
    dpo = moved(DPO(model))
    shared = dpo.ref_model.model.embed_tokens.weight
    version = shared._version
    model.mean += 1
    model.count += 1
    dpo.sync_reference(0.5)
    assert shared is model.model.embed_tokens.weight and shared._version == version
    assert dpo.ref_model.mean.tolist() == [1.5, 2.5] and dpo.ref_model.count == 4


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["lm_head"]}])
def test_lora(kwargs):
    policy = lora(ZOO["hf-llama"](0), **kwargs)
    dpo = DPO(policy, reference="copy")
    assert abs(dpo(**arguments(CASE)) - LN2) < 1e-6
    base = {id(p) for p in policy.parameters() if not p.requires_grad}
    own = {n: p for n, p in dpo.ref_model.named_parameters() if id(p) not in base}
    assert own and all("lora_" in name or "modules_to_save" in name for name in own)
    moved(dpo)
    before, trained = {n: p.clone() for n, p in own.items()}, dict(policy.named_parameters())
    dpo.sync_reference(0.6)
    for name, p in own.items():
        torch.testing.assert_close(p, 0.6 * trained[name] + 0.4 * before[name], rtol=1e-6, atol=1e-7)
    dpo.sync_reference(1.0)
    assert abs(dpo(**arguments(CASE)) - LN2) < 1e-6


def test_what_cannot_be_updated_is_refused(tmp_path):
    model = ZOO["xt-rotary"](0)
    refused = {
        "weights of its own to update, but it is the policy with its adapter off": DPO(
            lora(ZOO["hf-llama"](0))
        ),
        "should have weights of its own to update, but it is none": DPO(model, reference="none"),
        "weights of its own to update, but it is log-probs computed before": DPO(
            model, reference=precompute_ref_log_probs(scored_sequences(pairs(), 30), model, tmp_path)
        ),
        "should be of the policy's architecture, but .* differs": DPO(model, reference=ZOO["hf-llama"](0)),
    }
    for sentence, dpo in refused.items():
        with pytest.raises(ValueError, match=f"{sentence}.*use reference = 'copy'"):
            dpo.sync_reference()
    for alpha in (0, -1, 1.5, "1", True, float("nan")):
        with pytest.raises(ValueError, match="alpha should be above 0 and at most 1"):
            DPO(model).sync_reference(alpha)


# each kind of reference


def trained_lora():
    policy = lora(ZOO["hf-llama"](0), modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p += 0.3 * torch.randn_like(p)
    return policy


KINDS = {
    "copy": lambda: DPO(ZOO["hf-llama"](0), reference="copy"),
    "copy with a closure": lambda: DPO(ZOO["xt-tied"](0), reference="copy"),  # which cannot be pickled
    "adapter": lambda: DPO(lora(ZOO["hf-llama"](0)), reference="adapter"),
    "loaded adapter": lambda: DPO(trained_lora()),
    "module": lambda: DPO(ZOO["xt-rotary"](0), reference=ZOO["hf-llama"](1)),
}


@pytest.mark.parametrize("kind", mark_slow_except(["copy with a closure", "adapter", "module"], KINDS))
def test_every_kind_survives_what_is_done_to_it(kind):
    torch.manual_seed(0)
    dpo = KINDS[kind]()
    start, reference = dpo(**arguments(CASE)), metric(dpo)
    assert (abs(start - LN2) < 1e-6) == (kind != "module")
    moved(dpo)
    assert metric(dpo) == reference and metric(dpo, "logps/chosen") != reference
    loss = dpo(**arguments(CASE))

    torch.manual_seed(0)
    again = moved(KINDS[kind](), 0.3)
    again.load_state_dict(dpo.state_dict())
    assert torch.equal(again(**arguments(CASE)), loss)

    twins = [copy.deepcopy(dpo)]
    if kind != "copy with a closure":
        twins.append(pickle.loads(pickle.dumps(dpo)))
    for twin in twins:
        assert torch.equal(twin(**arguments(CASE)), loss) and metric(twin) == reference
        moved(twin)
        assert metric(twin) == reference and torch.equal(dpo(**arguments(CASE)), loss)

    before = metric(dpo.to(torch.float64))
    assert abs(before - reference) < 1e-3 and before.dtype == torch.float64
    assert metric(moved(dpo)) == before


@pytest.mark.parametrize("name", ["xt-tied", "hf-llama"])
def test_a_copy_in_another_dtype(name):
    model = ZOO[name](0)
    next(model.parameters()).requires_grad_(False)
    dpo = DPO(model, reference="copy", reference_dtype=torch.bfloat16)
    assert {p.dtype for p in dpo.ref_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    start, reference = dpo(**arguments(CASE)), metric(dpo)
    assert 0 < abs(start - LN2) < 0.05 and start.dtype == torch.float32
    moved(dpo)
    assert metric(dpo) == reference
    dpo.sync_reference(1.0)
    assert abs(dpo(**arguments(CASE)) - LN2) < 0.05 and metric(dpo) != reference
    assert DPO(model, reference_dtype=torch.bfloat16).ref_model is not None  # a copy, of itself
    for kind in ("none", ZOO[name](1)):
        with pytest.raises(ValueError, match="reference_dtype is for reference = 'copy', but it is"):
            DPO(model, reference=kind, reference_dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match="reference_dtype should be a torch dtype of floats, but it is 'bf16'"
    ):
        DPO(model, reference="copy", reference_dtype="bf16")


@pytest.mark.parametrize("name", mark_slow_except(["xt-tied"], ["xt-tied", "hf-llama", "xt-rotary-flash"]))
def test_a_copy_with_a_device_of_its_own(name):
    model = ZOO[name](0)
    next(model.parameters()).requires_grad_(False)
    plain = DPO(copy.deepcopy(model), reference="copy")
    dpo = DPO(model, reference="copy", reference_device="cpu")
    assert dpo(**arguments(CASE)) == plain(**arguments(CASE)) and metric(dpo) == metric(plain)
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert not own & {t.data_ptr() for t in dpo.ref_model.state_dict().values()}, "nothing is shared"
    before = {key: t.clone() for key, t in dpo.ref_model.state_dict().items()}

    assert dpo.to(torch.float64) is dpo  # a cast is for both
    assert {p.dtype for p in dpo.parameters()} == {torch.float64}
    dpo.float().to("meta")  # a move is for the policy alone
    assert {p.device.type for p in dpo.policy_model.parameters()} == {"meta"}
    after = dpo.ref_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert set(dict(dpo.named_children())) == set(dict(plain.named_children()))
    plain.to("meta")
    assert {p.device.type for p in plain.parameters()} == {"meta"}


def test_a_reference_apart_survives_what_modules_go_through():
    dpo = DPO(ZOO["xt-tied"](0), reference="copy", reference_device="cpu", reference_dtype=torch.bfloat16)
    reference = metric(moved(dpo))
    other = DPO(ZOO["xt-tied"](1), reference="copy", reference_device="cpu", reference_dtype=torch.bfloat16)
    other.load_state_dict(dpo.state_dict())
    for twin in (copy.deepcopy(dpo), other):
        assert metric(twin) == reference
        twin.sync_reference(1.0)
        assert metric(twin) != reference
    names = {name for name, _ in dpo.named_parameters()} | {name for name, _ in dpo.named_buffers()}
    away = {name for name in names if name.startswith("ref_model.")}
    assert set(dpo._ddp_params_and_buffers_to_ignore) == away and away < names
    assert DPO(ZOO["xt-tied"](0))._ddp_params_and_buffers_to_ignore == []


@pytest.mark.parametrize(
    "options, kind, message",
    [
        (
            {"reference_device": "moon"},
            ValueError,
            "should be a device of this machine, like 'cpu', but it is 'moon'",
        ),
        (
            {"reference_device": 3.5},
            ValueError,
            "should be a device of this machine, like 'cpu', but it is 3.5",
        ),
        (
            {"reference_device": "cpu", "reference": "none"},
            ValueError,
            "reference_device is for reference = 'copy'",
        ),
        (
            {"cache_ref_log_probs": True, "reference": "none"},
            ValueError,
            r"cache_ref_log_probs should be left out where the reference computes nothing \(there is none\)",
        ),
        (
            {"cache_ref_log_probs": True, "loss": SimPO()},
            ValueError,
            r"cache_ref_log_probs should be left out where the reference computes nothing \(there is none\)",
        ),
        (
            {"cache_ref_log_probs": True, "reference": CachedReference(per_token=False)},
            ValueError,
            r"where the reference computes nothing \(its log-probs are there already\)",
        ),
    ],
)
def test_options_of_a_reference_that_cannot_act(options, kind, message):
    with pytest.raises(kind, match=message):
        DPO(ZOO["xt-tied"](0), **options)


@pytest.mark.cuda
def test_a_reference_on_the_cpu_beside_a_policy_on_cuda():
    dpo = DPO(ZOO["hf-llama"](0), reference_device="cpu").cuda()
    assert {p.device.type for p in dpo.ref_model.parameters()} == {"cpu"}
    columns = {
        k: tuple(t.cuda() for t in v) if isinstance(v, tuple) else v.cuda()
        for k, v in arguments(CASE).items()
    }
    loss = dpo(**columns)
    assert abs(loss.item() - LN2) < 1e-4 and loss.is_cuda
    loss.backward()
    dpo.sync_reference(0.5)


# the training command


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(BUNDLED.read_text(encoding="utf-8").splitlines(keepends=True)[:26]))
    return path


@pytest.mark.slow
def test_the_training_command_updates_and_resumes(rows, tmp_path):
    options = {"sft_epochs": 0, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5, "save_steps": 2}
    train(make_config(rows, tmp_path / "whole", **options))
    steps = [r["logps/ref_chosen"] for r in read_metrics(tmp_path / "whole") if r["part"] == "eval"]
    assert len(set(steps)) > 2, "the reference moves"
    with interrupt_training("dpo", after_steps=5):  # after an update that is in the checkpoint of step 4
        train(make_config(rows, tmp_path / "out", **options))
    train(make_config(rows, tmp_path / "out", resume=True, **options))
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "whole")


@pytest.mark.pitfall(25)
def test_options_that_cannot_act_are_refused(rows, tmp_path):
    refused = [
        (
            {"ref_model_sync_steps": 2, "precompute_ref_log_probs": True},
            "--precompute-ref-log-probs needs a reference that does not change",
        ),
        (
            {"ref_model_sync_steps": 2, "keep_best": True},
            "--keep-best should be given with a reference that does not .* but --ref-model-sync-steps",
        ),
        (
            {"ref_model_sync_steps": 2, "early_stopping_patience": 3},
            "--early-stopping-patience should be given with a reference that does not change",
        ),
        (
            {"ref_model_mixup_alpha": 0.5},
            "--ref-model-mixup-alpha should be given together with --ref-model-sync-steps",
        ),
        (
            {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.0},
            "--ref-model-mixup-alpha should be above 0",
        ),
        (
            {"ref_model_sync_steps": 2, "reference": "none"},
            "--ref-model-sync-steps needs a reference, but --reference is none",
        ),
        (
            {"ref_model_sync_steps": 2, "loss": "simpo"},
            "--ref-model-sync-steps needs a reference, but .* needs none",
        ),
    ]
    for options, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            train(make_config(rows, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_reference_apart_from_the_command_line(rows, tmp_path):
    options = {"sft_epochs": 0, "epochs": 1}
    train(make_config(rows, tmp_path / "plain", **options))
    train(make_config(rows, tmp_path / "apart", reference_device="cpu", **options))
    assert read_metrics(tmp_path / "plain") == read_metrics(tmp_path / "apart")
    train(make_config(rows, tmp_path / "narrow", reference_dtype="bfloat16", **options))
    plain, narrow = (read_metrics(tmp_path / name)[0]["logps/ref_chosen"] for name in ("plain", "narrow"))
    assert plain != narrow and plain == pytest.approx(narrow, rel=0.02)
    for more, message in (
        (
            {"reference": "none", "reference_device": "cpu"},
            "--reference-device needs a reference, but",
        ),
        (
            {"loss": "simpo", "reference_dtype": "bfloat16"},
            "--reference-dtype needs a reference, but --loss",
        ),
        ({"reference_device": "moon"}, "should be a device of this machine"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make_config(rows, tmp_path / "none", **(options | more)))
    with pytest.raises(ValueError, match="are options of a frozen copy, but"):
        make_config(rows, tmp_path / "none", precompute_ref_log_probs=True, reference_device="cpu")
