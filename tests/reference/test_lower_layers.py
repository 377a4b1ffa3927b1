"""Lower layers that policy and reference have in common run once, and nothing else changes by it."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO, RankedBatch, UnpairedBatch
from dpo_wrapper.losses import KTO, PairLogProbs, PlackettLuce
from dpo_wrapper.models import language_model
from dpo_wrapper.models.lower_layers import LayerRecord
from dpo_wrapper.prefix_tree import PrefixSharingError
from dpo_wrapper.reference.lower_layers import LowerLayers
from helpers.adapters import lora
from helpers.dpo_calls import arguments, nudged
from helpers.marks import mark_slow_except
from helpers.models import ROTARY, VOCAB
from helpers.ranked_batches import lists_of_ids, rows_of_ids
from helpers.shareable_models import (
    CASES,
    GEMMA2,
    Make,
    assert_close,
    hf,
    loss_and_gradients,
    xt,
)

LAYERS = dict(num_hidden_layers=4)
FAMILIES: dict[str, Make] = {
    "llama": hf("Llama", **LAYERS),
    "qwen2": hf("Qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=2, **LAYERS),
    "mistral": hf("Mistral", "sdpa", sliding_window=3, **LAYERS),
    "gemma2": hf("Gemma2", "eager", sliding_window=3, **GEMMA2, **LAYERS),
    "gemma3": hf("Gemma3", config_suffix="TextConfig", head_dim=8, sliding_window=3, **LAYERS),
    "mixtral": hf("Mixtral", num_local_experts=3, num_experts_per_tok=2, **LAYERS),
    "lfm2": hf("Lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"], **LAYERS),
}
XT: dict[str, Make] = {
    "rotary": xt(decoder=ROTARY),
    "flash": xt(decoder=ROTARY | dict(attn_flash=True)),
    "post-norm": xt(decoder=dict(pre_norm=False)),
    "gates": xt(decoder=dict(gate_residual=True)),
    "streams": xt(decoder=dict(num_residual_streams=2)),
}
ONCE = "are computed once for both"


def upper_lora(make: Make, layers: tuple[int, ...] = (2, 3), **kwargs: Any) -> nn.Module:
    return lora(make(0).double(), layers_to_transform=list(layers), **kwargs)


def freeze_lower(model: nn.Module, prefixes: tuple[str, ...]) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(prefixes))
    return model.double()


def move_policy(dpo: DPO) -> DPO:
    """Change all that trains, so that policy and reference differ."""
    trained = nn.ParameterList([p for p in dpo.policy_model.parameters() if p.requires_grad])
    nudged(trained, 0.1)
    return dpo


@contextlib.contextmanager
def whole_passes() -> Iterator[None]:
    with mock.patch.object(LowerLayers, "common_layers", lambda self: ([], [])):
        yield


def assert_same_results(dpo: DPO, case: Any = CASES[1], expected: str = ONCE) -> None:
    """That losses, metrics and all gradients are those of whole passes, and that lower layers ran once."""
    results = loss_and_gradients(dpo, case)
    assert expected in dpo.explain(), dpo.explain()
    with whole_passes():
        assert_close(results, loss_and_gradients(dpo, case), 1e-12)


def explain_after_call(dpo: DPO) -> str:
    assert_same_results(dpo, expected="no layer is computed for both at once")
    return dpo.explain()


def count_runs(model: nn.Module) -> list[int]:
    """A list to which each layer adds its number when it runs; hooks would show what hooks do."""
    runs: list[int] = []
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    for k, layer in enumerate(base.model.layers):

        def forward(*args: Any, own: Any = layer.mlp.forward, k: int = k, **kwargs: Any) -> Any:
            runs.append(k)
            return own(*args, **kwargs)

        layer.mlp.forward = forward
    return runs


@pytest.mark.parametrize("share_prefix", ["auto", False])
@pytest.mark.parametrize("name", mark_slow_except(["llama", "gemma3", "mixtral"], FAMILIES))
@pytest.mark.filterwarnings("ignore:prefixes are not shared")
def test_an_adapter_in_upper_layers(name, share_prefix):
    dpo = move_policy(DPO(upper_lora(FAMILIES[name]), share_prefix=share_prefix))
    assert dpo.ref_model is None
    last = 2 if name == "lfm2" else 1  # layer 2 of which is a convolution
    assert_same_results(dpo, expected=f"layers 0 to {last} of 4 are computed once for both")


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_loaded_adapter_whose_reference_is_a_copy(share_prefix):
    policy = upper_lora(FAMILIES["llama"])
    nudged(nn.ParameterList([p for p in policy.parameters() if p.requires_grad]), 0.1)
    dpo = move_policy(DPO(policy, share_prefix=share_prefix))
    assert dpo.ref_model is not None
    assert_same_results(dpo, expected="layers 0 to 1 of 4")


@pytest.mark.parametrize("name", mark_slow_except(["qwen2"], ["llama", "qwen2", "gemma2"]))
def test_a_full_fine_tune_of_upper_layers(name):
    frozen = ("model.embed_tokens", "model.layers.0.", "model.layers.1.", "model.layers.2.", "lm_head")
    dpo = move_policy(DPO(freeze_lower(FAMILIES[name](0), frozen)))
    assert_same_results(dpo, expected="layers 0 to 2 of 4")


@pytest.mark.parametrize("share_prefix", ["auto", False])
@pytest.mark.parametrize("name", mark_slow_except(["rotary", "streams"], XT))
def test_upper_blocks_of_x_transformers(name, share_prefix):
    frozen = ("token_emb", "pos_emb", "attn_layers.stream", *(f"attn_layers.layers.{k}." for k in range(3)))
    dpo = move_policy(DPO(freeze_lower(XT[name](0), frozen), share_prefix=share_prefix))
    assert_same_results(dpo, expected="blocks 0 to 2 of 4")


def test_frozen_weights_of_zeros():
    """What stands in for them in other trials would not be the reference's."""
    policy = FAMILIES["qwen2"](0)
    nn.init.zeros_(policy.model.layers[0].self_attn.q_proj.bias)
    dpo = move_policy(DPO(freeze_lower(policy, ("model.embed_tokens", "model.layers.0."))))
    assert_same_results(dpo, expected="layer 0 of 4 is computed once for both")


def test_a_trained_head_alone():
    model = FAMILIES["llama"](0)
    dpo = move_policy(DPO(freeze_lower(model, ("model.",))))
    assert_same_results(dpo, expected="layers 0 to 3 of 4")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    policy = upper_lora(FAMILIES["llama"]).train()
    policy.enable_input_require_grads()
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
    dpo = move_policy(DPO(policy))
    results = {}
    for context in (contextlib.nullcontext(), whole_passes()):
        with context:
            policy.zero_grad()
            dpo(**arguments(CASES[1])).backward()  # reentrant checkpoints take no torch.autograd.grad
        gradients = [p.grad.clone() for p in policy.parameters() if p.requires_grad]
        results[len(results)] = gradients
        assert all(gradient.any() for gradient in gradients)
    assert ONCE in dpo.explain()
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [dict(wpo=True), dict(ld_alpha=0.3)])
def test_options_of_dpo(options):
    dpo = move_policy(DPO(upper_lora(FAMILIES["llama"]), **options))
    for case in CASES:
        assert_same_results(dpo, case)


@pytest.mark.parametrize("kind", ["ranked", "unpaired"])
def test_other_batches(kind):
    policy = upper_lora(FAMILIES["llama"])
    if kind == "ranked":
        batch, loss = RankedBatch.from_lists(*lists_of_ids()), PlackettLuce()
    else:
        batch, loss = UnpairedBatch.from_lists(*rows_of_ids()), KTO()
    dpo = move_policy(DPO(policy, loss=loss))
    runs = count_runs(policy)
    results: list[tuple[Tensor, ...]] = []
    for context in (contextlib.nullcontext(), contextlib.nullcontext(), whole_passes()):
        with context:
            runs.clear()
            value = dpo(batch)
            counts = [runs.count(k) for k in range(4)]
            trained = [p for p in policy.parameters() if p.requires_grad]
            results.append((value.detach(), *torch.autograd.grad(value, trained)))
            passes = 1 if kind == "ranked" else 2  # for KTO those of its KL estimate too
            assert len(results) != 2 or counts == [passes, passes, 2 * passes, 2 * passes]
    torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[1], results[2], rtol=1e-12, atol=1e-12)


def test_lower_layers_run_in_the_pass_of_the_reference_alone():
    policy = upper_lora(FAMILIES["llama"])
    dpo = DPO(policy, cache_ref_log_probs=True)
    dpo(**arguments(CASES[0]))  # the trial runs all layers
    runs = count_runs(policy)
    dpo(**arguments(CASES[1])).backward()
    assert [runs.count(k) for k in range(4)] == [1, 1, 2, 2]
    runs.clear()
    dpo(**arguments(CASES[1])).backward()  # the reference is known, so the policy's pass is whole
    assert [runs.count(k) for k in range(4)] == [1, 1, 1, 1]
    runs.clear()
    known = (torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    dpo(**arguments(CASES[1]), ref_log_probs=known)
    with torch.no_grad():
        dpo(**arguments(CASES[2]))
    assert [runs.count(k) for k in range(4)] == [2, 2, 3, 3]


def test_micro_batches_and_evaluation_in_turns():
    dpo = move_policy(DPO(upper_lora(FAMILIES["llama"])))
    for case in (*CASES, CASES[0]):
        with torch.no_grad():
            assert torch.isfinite(dpo(**arguments(case)))
        assert_same_results(dpo, case)


def test_what_is_recorded_is_freed_after_the_pass_of_the_policy():
    records: list[LayerRecord] = []
    init = LayerRecord.__init__

    def note(record: LayerRecord, *args: Any) -> None:
        init(record, *args)
        records.append(record)

    def loss(log_probs: PairLogProbs) -> Tensor:
        outputs.append([record.output for record in records])
        return -log_probs.chosen

    outputs: list[list[Any]] = []
    dpo = DPO(upper_lora(FAMILIES["llama"]), loss=loss, reference="adapter")
    with mock.patch.object(LayerRecord, "__init__", note):
        dpo(**arguments(CASES[1]))
        assert ONCE in dpo.explain()
        records.clear()
        dpo(**arguments(CASES[1]))
    assert len(records) == 1 and outputs[1:] == [[None]]


def test_a_policy_that_gives_the_tree_up():
    policy = upper_lora(FAMILIES["llama"])
    dpo = move_policy(DPO(policy, reference="copy", share_prefix="auto"))
    assert_same_results(dpo)
    layer, has_run = policy.base_model.model.model.layers[3], []

    def refuse_once(*args: Any, own: Any = layer.forward, **kwargs: Any) -> Any:
        if not has_run:
            has_run.append(True)
            raise PrefixSharingError("it has changed")
        return own(*args, **kwargs)

    layer.forward = refuse_once
    with pytest.warns(UserWarning, match="no longer shared"):
        results = loss_and_gradients(dpo, CASES[1])
    with whole_passes():
        assert_close(results, loss_and_gradients(dpo, CASES[1]), 1e-12)
    assert_same_results(dpo, expected="for the two are computed over different trees")


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


def test_autocast():
    dpo = move_policy(DPO(upper_lora(FAMILIES["llama"]).float()))
    assert_same_results(dpo)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_results(dpo)


def test_evaluation_first_and_an_embedding_that_moves_afterwards():
    """Policy and reference are equal at the start, but what is below their common layers will differ."""
    dpo = DPO(freeze_lower(FAMILIES["llama"](0), ("model.layers.",)))
    with torch.no_grad():
        dpo(**arguments(CASES[0]))
    move_policy(dpo)
    assert "for what is below them trains" in explain_after_call(dpo)


def test_other_threads_run_whole_passes():
    model = FAMILIES["llama"](0).double()
    layers = language_model(model).decoder_layers()[:2]
    record, ids, outputs = LayerRecord(layers, layers), torch.arange(6)[None], []

    def run() -> None:
        outputs.append(model(ids).logits.detach())

    with record.recording():
        run()
    record.output = torch.zeros_like(record.output)
    with record.replaying():
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert not torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0]) and torch.equal(outputs[3], outputs[0])


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
    assert DPO(policy).lower_layers.why_whole_passes() == "they are compiled together"


def test_layers_that_accelerate_moves():
    hooks = pytest.importorskip("accelerate.hooks")
    policy = upper_lora(FAMILIES["llama"])
    hooks.add_hook_to_module(policy.get_base_model().model.layers[3], hooks.AlignDevicesHook("cpu"))
    assert "for accelerate has spread it over devices" in explain_after_call(DPO(policy))
