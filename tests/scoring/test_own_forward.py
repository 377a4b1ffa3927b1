"""Models whose logits need their own forward as a whole: PEFT's arguments, hooks on the model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO
from helpers.models import ZOO, hf_llama, seeded
from helpers.naive_dpo import ARGUMENTS, naive_loss

TOKEN = int(ARGUMENTS["preferred_seq"][0, 2])  # of a prompt


def adapted(config: str, **kwargs: Any) -> nn.Module:
    """A tiny Llama with an adapter of PEFT that is trained a little."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, config):
        pytest.skip(f"this version of PEFT has no {config}")
    with seeded(0), torch.no_grad():
        model = peft.get_peft_model(hf_llama(0), getattr(peft, config)(task_type="CAUSAL_LM", **kwargs))
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return model.eval()


def assert_own_gradients(dpo: DPO, expected: Tensor) -> None:
    """That loss and gradients are those of the model's own logits, and not zero."""
    trained = [p for p in dpo.policy_model.parameters() if p.requires_grad]
    loss = dpo(**ARGUMENTS)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    grads, expected_grads = (
        torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
        for value in (loss, expected)
    )
    for grad, truth in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-3, atol=1e-6)
    assert all(grad.any() for grad in grads[:2])


@pytest.mark.filterwarnings("ignore:all logits", "ignore:prefixes are not shared")
@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_alora_finds_its_invocation_tokens(share_prefix):
    options = dict(r=2, target_modules=["q_proj", "v_proj"])
    policy, reference = adapted("LoraConfig", alora_invocation_tokens=[TOKEN], **options), hf_llama(0).eval()
    dpo = DPO(policy, reference=reference, share_prefix=share_prefix)
    assert_own_gradients(dpo, naive_loss(policy, reference))
    assert "all logits are computed, for PEFT looks for the invocation tokens" in dpo.policy.explain()


@pytest.mark.filterwarnings("ignore:all logits", "ignore:prefixes are not shared", "ignore:`past_key_values`")
@pytest.mark.parametrize("share_prefix", ["auto", False])
def test_a_shadow_adapter_runs_with_the_model(share_prefix):
    policy, reference = adapted("ShadowConfig"), hf_llama(0).eval()
    dpo = DPO(policy, reference=reference, share_prefix=share_prefix)
    assert_own_gradients(dpo, naive_loss(policy, reference))
    assert "all logits are computed, for hooks are called" in dpo.policy.explain()


@pytest.mark.filterwarnings("ignore:all logits", "ignore:prefixes are not shared")
@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_logits_of_a_learned_prompt_are_left_out(config):
    class WithoutPrompt(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits[:, 3:]

    policy, reference = adapted(config, num_virtual_tokens=3), hf_llama(0).eval()
    dpo = DPO(policy, reference=reference)
    assert_own_gradients(dpo, naive_loss(WithoutPrompt(policy), reference))
    assert "PEFT adds a learned prompt" in dpo.policy.explain()


@pytest.mark.filterwarnings("ignore:all logits")
@pytest.mark.parametrize("name", ["hf-llama", "xt-rotary", "xt-wrapped"])
def test_hooks_on_the_model_act_on_its_logits(name):
    policy, reference = ZOO[name](0).eval(), ZOO[name](0).eval()
    bias = torch.randn(37, generator=torch.Generator().manual_seed(0))

    def add_bias(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + bias
        output.logits = output.logits + bias
        return output

    dpo = DPO(policy, reference=reference)
    before = dpo(**ARGUMENTS)
    model = getattr(policy, "net", policy)
    model.register_forward_hook(add_bias)  # after the first call, which looked at the model
    expected = naive_loss(model, getattr(reference, "net", reference))
    assert_own_gradients(dpo, expected)
    assert abs(expected - before) > 1e-3
    assert "all logits are computed, for hooks are called" in dpo.policy.explain()
