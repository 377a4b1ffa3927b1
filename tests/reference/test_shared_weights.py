"""Weights that policy and reference share: the reference stays bit for bit, or the call is refused."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from dpo_wrapper import DPO
from helpers.adapters import lora
from helpers.dpo_calls import LN2
from helpers.marks import mark_slow_except
from helpers.models import ZOO
from helpers.naive_dpo import ARGUMENTS, reference_log_probs, train

WRITTEN = r"should stay as it was when DPO was made.*but it was written.*a reference_dtype"
MERGED = r"adapter should be apart from weights that the reference shares.*call unmerge_adapter\(\)"


def trained_lora(dtype=torch.float32, **kwargs):
    policy = lora(ZOO["hf-llama"](0), **kwargs).to(dtype)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p += 0.3 * torch.randn_like(p)
    return policy


@pytest.mark.parametrize(
    "kind, name",
    mark_slow_except(
        [("auto", "lm_head"), ("adapter", "q_proj"), ("copy", "q_proj")],
        product(["auto", "adapter", "copy"], ["lm_head", "q_proj"]),
    ),
)
def test_base_weights_that_begin_to_train_are_refused(kind, name):
    dpo = DPO(lora(ZOO["hf-llama"](0)), reference=kind)
    train(dpo)
    before = reference_log_probs(dpo)
    parameters = [p for n, p in dpo.policy_model.named_parameters() if name in n and "lora_" not in n]
    for p in parameters:
        p.requires_grad_(True)
    with pytest.raises(ValueError, match=rf"{name}.*weight was frozen when DPO was made, .* now it trains"):
        dpo(**ARGUMENTS)
    for p in parameters:
        p.requires_grad_(False)
    assert reference_log_probs(dpo) == before


@pytest.mark.parametrize(
    "dtype, is_trained, safe_merge",
    mark_slow_except(
        [
            (torch.float32, True, True),
            (torch.float32, False, False),
            (torch.bfloat16, True, False),
            (torch.bfloat16, False, True),
        ],
        product([torch.float32, torch.bfloat16], [True, False], [True, False]),
    ),
)
def test_rounds_of_merging_leave_the_reference_or_are_refused(dtype, is_trained, safe_merge):
    policy = trained_lora(dtype) if is_trained else lora(ZOO["hf-llama"](0)).to(dtype)
    dpo = DPO(policy)
    assert (dpo.ref_model is None) != is_trained
    train(dpo)
    before = reference_log_probs(dpo)
    base = {name: p.clone() for name, p in policy.named_parameters() if "lora_" not in name}
    policy.merge_adapter(safe_merge=safe_merge)
    with torch.no_grad(), pytest.raises(ValueError, match=MERGED):
        dpo(**ARGUMENTS)
    for _ in range(30):
        policy.unmerge_adapter()
        policy.merge_adapter(safe_merge=safe_merge)
    policy.unmerge_adapter()
    assert not all(torch.equal(p, base[name]) for name, p in policy.named_parameters() if name in base)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"q_proj.base_layer.weight {WRITTEN}"):
            dpo(**ARGUMENTS)
    with torch.no_grad():  # the base put back is as good as new
        for name, p in policy.named_parameters():
            p.copy_(base.get(name, p))
    assert reference_log_probs(dpo) == before


def test_the_remedy_leaves_the_reference_bit_for_bit():
    policy = trained_lora(torch.bfloat16)
    dpo = DPO(policy, reference="copy", reference_dtype=torch.bfloat16)
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in dpo.ref_model.parameters()}
    train(dpo)
    before = reference_log_probs(dpo)
    for _ in range(10):
        policy.merge_adapter()
        with torch.no_grad():
            assert reference_log_probs(dpo.eval()) == before
        policy.unmerge_adapter()
    assert reference_log_probs(dpo.train()) == before


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("merge", ["merge_and_unload", "unload"])
def test_an_adapter_that_was_unloaded(is_trained, merge):
    policy = trained_lora() if is_trained else lora(ZOO["hf-llama"](0))
    dpo = DPO(policy)
    train(dpo)
    before = reference_log_probs(dpo)
    getattr(policy, merge)()
    with torch.no_grad():
        if is_trained and merge == "unload":
            assert reference_log_probs(dpo) == before  # the copy has an adapter of its own
        else:
            match = (
                WRITTEN if is_trained else "should keep the adapter .* but it was unloaded: make a new DPO"
            )
            with pytest.raises(ValueError, match=match):
                dpo(**ARGUMENTS)


def test_a_write_that_autograd_counts_is_found_anywhere():
    policy = trained_lora()
    dpo = DPO(policy)
    before = reference_log_probs(dpo)
    model = policy.base_model.model.model
    norms = {"norm": model.norm.weight, "layers.0.input_layernorm": model.layers[0].input_layernorm.weight}
    values = [p.clone() for p in norms.values()]
    with torch.no_grad():
        for p in norms.values():
            p[0] += 1
        for (name, p), value in zip(reversed(norms.items()), reversed(values), strict=True):
            with pytest.raises(ValueError, match=f"{name}.weight {WRITTEN}"):
                dpo(**ARGUMENTS)
            p.copy_(value)
    assert reference_log_probs(dpo) == before


def test_a_lora_may_be_evaluated_in_inference_mode_first():
    for policy in (trained_lora(), lora(ZOO["hf-llama"](0))):
        dpo = DPO(policy)
        with torch.inference_mode():
            assert abs(dpo(**ARGUMENTS) - LN2) < 1e-6
        train(dpo)


def test_what_is_done_to_both_is_no_write():
    dpo = DPO(trained_lora())
    train(dpo)
    other = DPO(trained_lora())
    with torch.no_grad():
        for p in dpo.parameters():
            p.mul_(1.5)
    other.load_state_dict(dpo.state_dict())
    loss = other(**ARGUMENTS)
    for twin in (copy.deepcopy(other), other.to(torch.bfloat16).to(torch.float64)):
        assert abs(twin(**ARGUMENTS) - loss) < 0.1
    before = reference_log_probs(other)
    train(other)
    assert reference_log_probs(other) == before


class LoraLinear(nn.Linear):
    """A layer that writes its factors into its frozen weight in eval mode, as loralib's does."""

    def __init__(self, n, m):
        super().__init__(n, m, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A, self.lora_B = (nn.Parameter(0.3 * torch.randn(s)) for s in ((2, n), (m, 2)))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.lora_B @ self.lora_A).data
            self.merged = not mode
        return self

    def forward(self, x):
        out = super().forward(x)
        return out if self.merged else out + x @ self.lora_A.T @ self.lora_B.T


def test_making_a_copy_merges_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(37, 8), LoraLinear(8, 37))
    weight = model[1].weight.clone()
    dpo = DPO(model)
    assert torch.equal(model[1].weight, weight) and not dpo.ref_model[1].merged
    assert dpo.ref_model[1].weight is model[1].weight


def test_a_fresh_dpo_of_a_lora_shares_its_base():
    policy = trained_lora()
    dpo = DPO(policy)
    base = {id(p) for name, p in policy.named_parameters() if "lora_" not in name}
    assert base <= {id(p) for p in dpo.ref_model.parameters()}
    assert abs(dpo(**ARGUMENTS) - LN2) < 1e-6


class BiasedHead(nn.Linear):
    """A head with a bias that is saved but no parameter, as the routers of DeepSeek-V3 have one."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False)
        self.weight = head.weight
        self.register_buffer("bias_of_ids", torch.zeros(head.out_features))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1  # is no weight
        return super().forward(x) + self.bias_of_ids


def with_biased_head():
    model = ZOO["hf-llama"](0)
    model.lm_head = BiasedHead(model.lm_head)
    return model


@pytest.mark.filterwarnings("ignore:all logits")
def test_a_written_buffer_of_the_base_is_refused():
    policy = lora(with_biased_head())
    dpo = DPO(policy, reference="adapter")
    train(dpo)
    policy.get_base_model().lm_head.bias_of_ids[5] += 1
    with pytest.raises(ValueError, match=f"bias_of_ids {WRITTEN}"):
        dpo(**ARGUMENTS)


@pytest.mark.filterwarnings("ignore:all logits")
def test_a_written_buffer_empties_the_memory_of_a_reference():
    dpo = DPO(with_biased_head(), cache_ref_log_probs=True)
    before = reference_log_probs(dpo)
    assert reference_log_probs(dpo) == before
    dpo.ref_model.lm_head.bias_of_ids[5] += 1
    changed = reference_log_probs(dpo)
    assert changed == pytest.approx(reference_log_probs(DPO(dpo.policy_model, reference=dpo.ref_model)))
    assert changed != pytest.approx(before, abs=1e-3)
