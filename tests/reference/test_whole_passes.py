"""Which layers of policy and reference do not run once for both, and what `DPO.explain` says of it."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO
from dpo_wrapper.reference.lower_layers import LowerLayers
from helpers.adapters import lora
from helpers.dpo_calls import arguments
from helpers.lower_layers import (
    FAMILIES,
    LAYERS,
    assert_same_results,
    explain_after_call,
    freeze_lower,
    move_policy,
    upper_lora,
)
from helpers.models import ROTARY, VOCAB
from helpers.shareable_models import CASES, hf, xt


def test_layers_that_all_have_an_adapter():
    dpo = move_policy(DPO(lora(FAMILIES["llama"](0).double())))
    with mock.patch.object(LowerLayers, "why_results_differ") as trial:
        assert "for layer 0 has an adapter" in explain_after_call(dpo)
    assert not trial.called


def test_reasons_for_whole_passes():
    make = FAMILIES["llama"]
    trained = move_policy(DPO(make(0).double()))
    assert "for layer 0 trains" in explain_after_call(trained)
    embedding = DPO(freeze_lower(make(0), ("model.layers.",)))
    assert "for what is below them trains" in explain_after_call(embedding)
    hooked = upper_lora(make)
    hooked.base_model.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert "for layer 0 has hooks" in explain_after_call(DPO(hooked))
    other = move_policy(DPO(upper_lora(make), reference=make(0).double()))
    assert "for layer 0 has other weights in the reference" in explain_after_call(other)
    balanced = DPO(upper_lora(FAMILIES["mixtral"]), router_aux_loss_coef=0.1)
    assert "for the loss that balances experts needs" in explain_after_call(balanced)
    assert "dropout may stay on" in explain_after_call(DPO(upper_lora(make).eval(), disable_dropout=False))


def test_a_state_that_changes_is_tried_anew():
    policy = upper_lora(FAMILIES["llama"])
    dpo = DPO(policy)
    assert_same_results(dpo, expected="layers 0 to 1 of 4")
    handle = policy.base_model.model.model.layers[1].register_forward_hook(lambda *_: None)
    assert_same_results(dpo, expected="layer 0 of 4 is computed once for both")
    handle.remove()
    assert_same_results(dpo, expected="layers 0 to 1 of 4")


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(())


GEMMA3N = hf(
    "Gemma3n",
    config_suffix="TextConfig",
    **LAYERS,
    head_dim=8,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=VOCAB,
    hidden_size_per_layer_input=4,
    laurel_rank=2,
    altup_num_inputs=2,
    activation_sparsity_pattern=[0.0] * 4,
    layer_types=["sliding_attention", "full_attention"] * 2,
)


def test_keys_and_values_that_upper_layers_read_are_missed_by_the_trial():
    assert "KeyError" in explain_after_call(move_policy(DPO(upper_lora(GEMMA3N))))


def test_values_of_the_first_layer_that_upper_ones_add_are_missed_by_the_trial():
    model = xt(decoder=ROTARY | dict(add_value_residual=True))(0)
    frozen = ("token_emb", "pos_emb", "attn_layers.layers.0.", "attn_layers.layers.1.")
    dpo = move_policy(DPO(freeze_lower(model, frozen)))
    assert "its log-probs would differ" in explain_after_call(dpo)


def test_the_same_weights_with_other_frequencies():
    frozen = ("model.embed_tokens", "model.layers.0.", "model.layers.1.")
    policy, other = (
        freeze_lower(FAMILIES["llama"](0), frozen),
        hf("Llama", rope_theta=2.0, **LAYERS)(0).double(),
    )
    for name, p in policy.named_parameters():
        if not p.requires_grad:
            other.get_parameter(name).data = p.data
    assert "its log-probs would differ" in explain_after_call(DPO(policy, reference=other))


def test_randomness_that_eval_mode_leaves():
    policy = upper_lora(FAMILIES["llama"])
    policy.base_model.model.model.layers[0].input_layernorm = Noise()
    dpo = DPO(policy, share_prefix=False)
    dpo(**arguments(CASES[0]))
    assert "its log-probs would differ" in dpo.explain()


@pytest.mark.filterwarnings("ignore:all logits", "ignore:prefixes are not shared")
def test_a_learned_prompt_below_the_layers():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=16)
    policy = peft.get_peft_model(FAMILIES["llama"](0).double(), config)
    assert "for what is below them trains" in explain_after_call(move_policy(DPO(policy)))


def test_evaluation_first_and_an_embedding_that_moves_afterwards():
    """Policy and reference are equal at the start, but what is below their common layers will differ."""
    dpo = DPO(freeze_lower(FAMILIES["llama"](0), ("model.layers.",)))
    with torch.no_grad():
        dpo(**arguments(CASES[0]))
    move_policy(dpo)
    assert "for what is below them trains" in explain_after_call(dpo)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["feed-forwards", "layers"])
def test_compiled_parts(part):
    torch._dynamo.reset()
    policy = upper_lora(FAMILIES["llama"])
    for layer in policy.get_base_model().model.layers:
        (layer if part == "layers" else layer.mlp).compile(backend="aot_eager")
    dpo = move_policy(DPO(policy, share_prefix=False))
    assert_same_results(dpo, expected="layers 0 to 1 of 4 are computed once for both")
    torch._dynamo.reset()


def test_layers_that_are_compiled_together():
    policy = upper_lora(FAMILIES["llama"])
    policy.get_base_model().model.compile(backend="eager")
    assert "for they are compiled together" in DPO(policy).explain()


def test_layers_that_accelerate_moves():
    hooks = pytest.importorskip("accelerate.hooks")
    policy = upper_lora(FAMILIES["llama"])
    hooks.add_hook_to_module(policy.get_base_model().model.layers[3], hooks.AlignDevicesHook("cpu"))
    assert "for accelerate has spread it over devices" in explain_after_call(DPO(policy))
