"""The reference: where it starts, and that it stays there."""

import functools

import pytest
import torch
from torch import Generator, nn

from dpo_wrapper import DPO, IPO, SFT, Sigmoid, SimPO
from helpers.adapters import lora
from helpers.batches import random_batch
from helpers.dpo_calls import arguments, nudged
from helpers.marks import mark_slow_except
from helpers.models import ZOO

TIED = ["xt-tied", "hf-llama-tied", "plain-tied"]
HEADS = [*TIED, "xt-absolute", "xt-wrapped", "xt-mixture", "hf-llama", "hf-gpt2"]


def train(dpo, case, optimizer, steps):
    for _ in range(steps):
        dpo(**arguments(case)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.pitfall(4)
@pytest.mark.parametrize("name", mark_slow_except(TIED[:2], HEADS))
def test_log_probs_are_bit_identical_after_50_optimizer_steps(name):
    dpo = DPO(ZOO[name](0))
    case = random_batch(Generator().manual_seed(0), b=3, odd=0)

    def reference_log_probs():
        metrics = dpo(**arguments(case), return_metrics=True)[1]
        return metrics["logps/ref_chosen"], metrics["logps/ref_rejected"], metrics["logps/chosen"]

    before = reference_log_probs()
    train(dpo, case, torch.optim.AdamW(dpo.parameters(), lr=1e-2, weight_decay=0.1), steps=50)
    after = reference_log_probs()
    assert after[:2] == before[:2]
    assert after[2] != before[2]
    assert all(p.grad is None and not p.requires_grad for p in dpo.ref_model.parameters())


def test_frozen_parameters_share_storage_and_trained_ones_do_not():
    model = ZOO["hf-llama"](0)
    model.model.embed_tokens.weight.requires_grad_(False)
    dpo = DPO(model)
    policy, reference = (dict(m.named_parameters()) for m in (dpo.policy_model, dpo.ref_model))
    shared = {name for name in policy if policy[name].data_ptr() == reference[name].data_ptr()}
    assert shared == {"model.embed_tokens.weight"}


def test_a_shared_parameter_that_begins_to_train_is_refused():
    model = ZOO["hf-llama"](0)
    model.model.embed_tokens.weight.requires_grad_(False)
    dpo = DPO(model)
    model.model.embed_tokens.weight.requires_grad_(True)
    case = random_batch(Generator().manual_seed(0), odd=0)
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight was frozen when DPO was made.*before making DPO"
    ):
        dpo(**arguments(case))


class Closures(nn.Module):
    """A head hidden in a partial around a lambda in a list, as user code has it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(37, 8)
        scale = 3.0
        self.heads = [
            functools.partial(lambda h, times: times * h @ self.embedding.weight.T / scale, times=2.0)
        ]

    def forward(self, ids):
        return self.heads[0](self.embedding(ids))


def test_closures_are_copied_wherever_they_are_held():
    policy = Closures()
    dpo = DPO(policy)
    assert dpo.ref_model.heads[0] is not policy.heads[0]
    case = random_batch(Generator().manual_seed(0), odd=0)
    before = dpo(**arguments(case), return_metrics=True)[1]["logps/ref_chosen"]
    nudged(policy, 0.5)
    assert dpo(**arguments(case), return_metrics=True)[1]["logps/ref_chosen"] == before


def test_a_reference_that_reads_the_policy_is_refused():
    policy = Closures()

    class Follower(nn.Module):
        def forward(self, ids):
            return policy.heads[0](policy.embedding(ids))

    dpo = DPO(policy, reference=Follower())
    with pytest.raises(ValueError, match="would follow the policy"):
        dpo(**arguments(random_batch(Generator().manual_seed(0), odd=0)))


def test_a_given_module_in_the_memory_of_the_policy_is_refused():
    policy, other = ZOO["hf-llama"](0), ZOO["hf-llama"](0)
    other.lm_head.weight = nn.Parameter(policy.lm_head.weight.data)
    with pytest.raises(ValueError, match=r"shares trained parameters .* use reference = 'copy'"):
        DPO(policy, reference=other)
    policy.lm_head.weight.requires_grad_(False)
    dpo = DPO(policy, reference=other)
    policy.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.weight was frozen when DPO was made"):
        dpo(**arguments(random_batch(Generator().manual_seed(0), odd=0)))


def test_a_given_module_is_used_and_left_as_it_was():
    policy, other = ZOO["xt-rotary"](0), ZOO["hf-llama"](1).train()
    frozen = other.lm_head.weight.requires_grad_(False)
    other.model.layers[0].eval()
    modes = [module.training for module in other.modules()]
    dpo = DPO(policy, reference=other)
    case = random_batch(Generator().manual_seed(0), odd=0)
    loss, metrics = dpo(**arguments(case), return_metrics=True)
    loss.backward()
    assert metrics["logps/ref_chosen"] != metrics["logps/chosen"]
    assert dpo.ref_model is other and [module.training for module in other.modules()] == modes
    assert all(p.grad is None and p.requires_grad != (p is frozen) for p in other.parameters())
    # DistributedDataParallel would wait for gradients of these
    ignored = set(dpo._ddp_params_and_buffers_to_ignore)
    assert ignored == {f"ref_model.{n}" for n, p in other.named_parameters() if p.requires_grad}


def test_a_policy_may_train_on_while_it_is_the_reference_of_another():
    """Self-play: the reference that an owner trains follows it, with a cache as well."""
    one, case = DPO(ZOO["hf-llama"](0)), random_batch(Generator().manual_seed(0), odd=0)
    two = DPO(ZOO["xt-rotary"](0), reference=one.policy_model, cache_ref_log_probs=True)
    before = two(**arguments(case), return_metrics=True)[1]
    train(one, case, torch.optim.SGD(one.policy_model.parameters(), lr=1.0), steps=1)
    after, policy = (dpo(**arguments(case), return_metrics=True)[1] for dpo in (two, one))
    assert after["logps/ref_chosen"] != before["logps/ref_chosen"]
    torch.testing.assert_close(after["logps/ref_chosen"], policy["logps/chosen"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "loss, kind",
    [
        (None, "copy"),
        (IPO(), "copy"),
        (SimPO(), "none"),
        ([(SimPO(), 1.0), (SFT(), 0.5)], "none"),
        ([(SFT(), 1.0), (Sigmoid(), 1.0)], "copy"),
    ],
)
def test_auto_has_a_reference_only_where_a_loss_needs_one(loss, kind):
    dpo = DPO(ZOO["xt-rotary"](0), loss=loss)
    assert (dpo.ref_model is None) == (kind == "none")


def test_auto_switches_a_fresh_adapter_off():
    dpo = DPO(lora(ZOO["hf-llama"](0)))
    case = random_batch(Generator().manual_seed(0), odd=0)
    assert dpo.ref_model is None
    assert abs(dpo(**arguments(case)) - 0.6931471805599453) < 1e-6
    before = dpo(**arguments(case), return_metrics=True)[1]
    train(dpo, case, torch.optim.SGD(dpo.parameters(), lr=1.0), steps=5)
    after = dpo(**arguments(case), return_metrics=True)[1]
    assert after["logps/ref_chosen"] == before["logps/ref_chosen"]
    assert after["logps/chosen"] != before["logps/chosen"]


@pytest.mark.pitfall(6)
@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_trained_adapter_is_part_of_the_reference(kwargs):
    policy = lora(ZOO["hf-llama"](0), **kwargs)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p += 0.3 * torch.randn_like(p)
    dpo = DPO(policy)
    base = {id(p) for p in policy.parameters() if not p.requires_grad}
    assert base <= {id(p) for p in dpo.ref_model.parameters()}  # the frozen weights are shared
    case = random_batch(Generator().manual_seed(0), odd=0)
    loss, before = dpo(**arguments(case), return_metrics=True)
    assert abs(loss - 0.6931471805599453) < 1e-6
    train(dpo, case, torch.optim.SGD(dpo.parameters(), lr=1.0), steps=5)
    after = dpo(**arguments(case), return_metrics=True)[1]
    assert after["logps/ref_chosen"] == before["logps/ref_chosen"]
