"""When a model is looked at again, and that a look leaves nothing behind."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO
from dpo_wrapper.scoring.stand_ins import preserved_state, stand_in_parameters
from helpers.adapters import lora
from helpers.dpo_calls import LN2, nudged
from helpers.kernels import scorers
from helpers.models import ZOO, PlainGRU, hf_llama
from helpers.naive_dpo import ARGUMENTS, naive_loss
from helpers.shareable_models import SHAREABLE, hf


def count_looks(dpo: DPO, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by the key of each look at a model."""
    from dpo_wrapper.scoring import scorer

    looks, probe_model = [], scorer.probe_model

    def counted(model: Any, key: Any, *args: Any) -> Any:
        if model is dpo.policy.language_model:
            looks.append(key)
        return probe_model(model, key, *args)

    monkeypatch.setattr(scorer, "probe_model", counted)
    return looks


def test_a_model_is_looked_at_once_for_each_state(monkeypatch):
    dpo = DPO(hf_llama(0))
    looks = count_looks(dpo, monkeypatch)
    with torch.no_grad():
        dpo(**ARGUMENTS)
    assert len(looks) == 1
    for _ in range(2):
        dpo(**ARGUMENTS).backward()
        with torch.no_grad():  # what holds with gradients holds without
            dpo(**ARGUMENTS)
    assert len(looks) == 2
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            dpo(**ARGUMENTS)
    assert len(looks) == 3 and looks[-1].autocast == torch.bfloat16
    dpo.policy_model.lm_head.requires_grad_(False)
    for _ in range(2):
        dpo(**ARGUMENTS)
    assert len(looks) == 4
    dpo.policy_model.gradient_checkpointing_enable()
    dpo(**ARGUMENTS)
    assert len(looks) == 5 and looks[-1].checkpointed > 0
    dpo.double()
    dpo(**ARGUMENTS)
    assert len(looks) == 6
    dpo(**ARGUMENTS)
    assert len(looks) == 6


@pytest.mark.filterwarnings("ignore:prefixes are not shared")
@pytest.mark.parametrize("name", ["qwen3", "llama-eager"])
def test_autocast_after_a_first_call_in_float32(name):
    make = hf("Qwen3", head_dim=8) if name == "qwen3" else SHAREABLE[name]
    dpo = DPO(nudged(make(0)), reference=make(0))
    with torch.no_grad():
        dpo(**ARGUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dpo(**ARGUMENTS)
        loss.backward()
    assert abs(loss - naive_loss(dpo.policy_model.eval(), dpo.ref_model)) < 0.05


def test_policy_and_the_reference_of_its_adapter_share_one_look():
    dpo = DPO(lora(hf_llama(0)))
    dpo(**ARGUMENTS).backward()
    assert dpo.ref_model is None and scorers(dpo)[1] is dpo.policy
    assert len({id(probe) for probe in dpo.policy.probes.values()}) == 1


@pytest.mark.filterwarnings("ignore:all logits")
def test_a_fresh_adapter_on_a_sharded_model(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, sharded = DPO(lora(hf_llama(0))), DPO(lora(hf_llama(0)))
        fully_shard(sharded.policy_model)
        losses = []
        for dpo in (plain, sharded):
            optimizer = torch.optim.SGD([p for p in dpo.parameters() if p.requires_grad], lr=0.1)
            for _ in range(3):
                losses.append(dpo(**ARGUMENTS))
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        distributed.destroy_process_group()
    assert torch.allclose(torch.stack(losses[:3]), torch.stack(losses[3:]), atol=1e-5)
    assert abs(losses[0].item() - LN2) < 1e-6 < abs(losses[2].item() - LN2)
    assert "its head is sharded" in sharded.policy.explain()


# nothing is left behind


class Counter(nn.Module):
    """Counts its calls and draws random numbers of both kinds, as no model should."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PlainGRU()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("latest", torch.zeros(2))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        self.latest = torch.rand(2) + random.random()
        return self.inner(ids)


@pytest.mark.parametrize("name", ["counter", "xt-rotary-flash", "hf-gpt2", "hf-llama-tied", "lora"])
def test_a_look_leaves_nothing_behind(name):
    policy = {"counter": Counter, "lora": lambda: lora(hf_llama(0))}.get(name, lambda: ZOO[name](0))()
    dpo = DPO(nudged(policy) if name != "lora" else policy, reference="none", loss=sft())
    parameters = dict(dpo.policy_model.named_parameters())
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    grads = {key: p.grad for key, p in parameters.items()}
    state = copy.deepcopy(dpo.policy_model.state_dict())
    buffers = {key: id(b) for key, b in dpo.policy_model.named_buffers()}
    random.seed(0)
    torch.manual_seed(0)
    before = (torch.get_rng_state(), random.getstate())
    batch = dpo.as_batch(*ARGUMENTS.values(), *[None] * (8 - len(ARGUMENTS)))
    assert dpo.policy.probe is not None and batch is not None
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    after = dict(dpo.policy_model.named_parameters())
    assert after.keys() == parameters.keys()
    for key, p in after.items():
        assert p is parameters[key] and p.grad is grads[key] and torch.equal(p.grad, torch.ones_like(p))
    assert {key: id(b) for key, b in dpo.policy_model.named_buffers()} == buffers
    for key, value in dpo.policy_model.state_dict().items():
        assert torch.equal(value, state[key]), key


def sft() -> Any:
    from dpo_wrapper.losses import SFT

    return SFT()


def test_stand_ins_of_zeros_are_noise_and_others_aliases():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight  # tied
    nn.init.zeros_(model["c"].weight)
    model["c"].requires_grad_(False)
    weight, zeros = model["a"].weight, model["c"].weight
    with stand_in_parameters(model), preserved_state(model, torch.device("cpu")):
        assert model["a"].weight is not weight and model["b"].weight is model["a"].weight
        assert model["a"].weight.data_ptr() == weight.data_ptr() and model["a"].weight.requires_grad
        assert model["c"].weight.any() and not zeros.any() and not model["c"].weight.requires_grad
        model["b"](torch.ones(3)).sum().backward()
        assert weight.grad is None
    assert model["a"].weight is weight is model["b"].weight and model["c"].weight is zeros
    assert weight.grad is None


class Shifted(nn.Module):
    """A layer that sees the token before its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1))


def swap_mlp(model: Any) -> None:
    model.model.layers[0].mlp = Shifted(model.model.layers[0].mlp)


def hook_attention(model: Any) -> None:
    """A hook that mixes tokens."""

    def mix(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (output[0] + output[0].cumsum(dim=1), *output[1:])

    model.model.layers[0].self_attn.register_forward_hook(mix)


def scale_logits(model: Any) -> None:
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 0.5 * output.logits
        return output

    model.forward = scaled


def scale_head(model: Any) -> None:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 0.5 * forward(hidden)


@pytest.mark.filterwarnings("ignore:prefixes are not shared", "ignore:all logits")
@pytest.mark.parametrize("change", [swap_mlp, hook_attention, scale_logits, scale_head])
def test_a_model_that_is_changed_after_the_first_call(change):
    reference = hf_llama(0).eval()
    dpo = DPO(nudged(hf_llama(0).eval(), 0.3), reference=reference)
    before = dpo(**ARGUMENTS)
    change(dpo.policy_model)
    expected = naive_loss(dpo.policy_model, reference)
    torch.testing.assert_close(dpo(**ARGUMENTS), expected, rtol=1e-5, atol=1e-6)
    assert abs(expected - before) > 1e-4
