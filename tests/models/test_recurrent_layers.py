"""Layers that carry a state along the sequence: which they are, and how they run over a tree in each mode."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpo_wrapper import DPO
from dpo_wrapper.models.hugging_face import HuggingFaceModel
from dpo_wrapper.models.hugging_face_recurrence import (
    called_functions,
    install_function_hook,
    install_recurrence_hooks,
)
from dpo_wrapper.models.recurrent import RecurrentTree, find_recurrent_layers
from dpo_wrapper.models.rerun import run_pass
from dpo_wrapper.prefix_tree import PrefixSharingError, TreeLayout, TreeOptions
from helpers.broken_trees import require_forks
from helpers.dpo_calls import arguments, nudged
from helpers.kernels import probes, shares_prefix
from helpers.marks import mark_slow_except
from helpers.models import ZOO, seeded
from helpers.oracle import ExactFloat64, to_float64
from helpers.shareable_models import (
    CASES,
    FORK,
    PATHS,
    RECURRENT,
    SHAREABLE,
    assert_close,
    hf,
    loss_and_gradients,
    make_dpo,
)
from helpers.trees import random_tree

RWKV = hf("Rwkv", attention_hidden_size=16, context_length=64)


def names_of_layers(model: nn.Module) -> set[str]:
    return {type(layer).__name__ for layer in find_recurrent_layers(model)}


@pytest.mark.parametrize("name", ["hf-llama", "hf-gpt2", "plain-transformer"])
def test_models_of_attention_alone_have_none(name):
    assert find_recurrent_layers(ZOO[name](0)) == []


@pytest.mark.parametrize(
    "make, names",
    [
        (SHAREABLE["qwen3.5"], {"Qwen3_5GatedDeltaNet"}),
        (SHAREABLE["lfm2"], {"Lfm2ShortConv"}),
        (SHAREABLE["recurrent-gemma"], {"RecurrentGemmaRecurrentBlock"}),
        (SHAREABLE["minimax"], {"MiniMaxLightningAttention"}),
        (RWKV, {"RwkvSelfAttention", "RwkvFeedForward"}),
    ],
)
def test_outermost_layers_with_a_state_are_found(make, names):
    assert names_of_layers(make(0)) == names


def test_a_convolution_that_mixes_channels_is_none():
    """As those that cut a picture or a sound into tokens."""
    assert find_recurrent_layers(nn.Sequential(nn.Conv1d(4, 8, 3))) == []
    assert names_of_layers(nn.Sequential(nn.Conv1d(4, 4, 3, groups=4))) == {"Sequential"}


@pytest.mark.parametrize(
    "name", mark_slow_except(["qwen3.5", "mamba2", "lfm2", "xt-shift", "minimax", "xt-gru"], RECURRENT)
)
def test_what_layers_do_over_a_tree_is_told(name):
    make, told = RECURRENT[name]
    if told.endswith(FORK) and not name.startswith("xt"):
        require_forks()
    dpo = make_dpo(make)
    dpo(**arguments(CASES[1]))
    expected = "paths" if told.endswith(PATHS) else "fork"
    for probe in probes(dpo):
        assert f"; its {told};" in probe.explain() and probe.kernels & {"paths", "fork"} == {expected}


def test_layers_that_do_not_run_over_the_tree_are_not_told_of():
    def make(seed: int) -> nn.Module:
        model = SHAREABLE["hf-llama"](seed)
        model.audio_encoder = nn.GRU(4, 4)
        return model

    dpo = make_dpo(make)
    dpo(**arguments(CASES[1]))
    assert shares_prefix(dpo) and "GRU" not in dpo.explain()


@pytest.mark.slow
def test_rwkv_which_changes_its_weights_in_eval_mode():
    shared, padded = (
        DPO(
            nudged(RWKV(0).double(), 0.05),
            reference=RWKV(0).double(),
            share_prefix=share,
            disable_dropout=False,
        )
        for share in (True, False)
    )
    with ExactFloat64():
        results, expected = loss_and_gradients(shared, CASES[1]), loss_and_gradients(padded, CASES[1])
    assert_close(results, expected, 1e-10)
    assert "RwkvFeedForward and RwkvSelfAttention layers run along each path" in shared.explain()


def test_functions_of_libraries_that_are_missing_stay_none(monkeypatch):
    """As older versions of transformers have them, which then compute the layer by other functions."""
    module: Any = ModuleType("layers_of_old")
    exec("class Layer:\n    def forward(self, x):\n        return causal_conv1d_fn(x)", vars(module))
    module.causal_conv1d_fn = None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    install_recurrence_hooks(module.Layer)
    assert module.causal_conv1d_fn is None


def test_a_layer_of_a_module_that_python_does_not_list_calls_no_known_function():
    module: Any = ModuleType("run_by_hand")
    module.causal_conv1d_fn = len
    exec("class Layer:\n    def forward(self, x):\n        return causal_conv1d_fn(x)", vars(module))
    assert called_functions(module.Layer) == frozenset()


def test_a_layer_of_a_compiled_extension_calls_no_known_function():
    assert called_functions(type("Layer", (), {"forward": len})) == frozenset()


@pytest.mark.parametrize("option", [{"initial_states": torch.zeros(2, 3)}, {"return_final_states": True}])
def test_a_function_that_is_given_a_state_or_asked_for_one_cannot_run_over_a_tree(option):
    module: Any = ModuleType("layers_with_states")
    module.causal_conv1d_fn = torch.add
    install_function_hook(module, "causal_conv1d_fn")
    x = torch.zeros(1, 2, 3)
    tree = RecurrentTree(TreeLayout.from_tree(random_tree(0), TreeOptions()), frozenset())
    with pytest.raises(PrefixSharingError, match="begin with a state, or ask for one"):
        run_pass(nn.Identity(), lambda: module.causal_conv1d_fn(x, x, **option), tree)


# whatever runs them


@pytest.mark.parametrize(
    "name",
    mark_slow_except(
        ["qwen3.5", "lfm2"], [name for name, (_, told) in RECURRENT.items() if name[:3] != "xt-"]
    ),
)
def test_layers_that_could_pass_a_state_on_run_along_paths_as_well(name, monkeypatch):
    monkeypatch.setattr(HuggingFaceModel, "state_kernels", lambda _: ["paths"])
    shared, padded = (make_dpo(SHAREABLE[name], share, exact=True) for share in (True, False))
    with ExactFloat64():
        results, expected = loss_and_gradients(shared, CASES[1]), loss_and_gradients(padded, CASES[1])
    assert_close(results, expected, 1e-10)
    assert all("fork" not in probe.kernels and "paths" in probe.kernels for probe in probes(shared))


@pytest.mark.parametrize("name", mark_slow_except(["lfm2"], ["lfm2", "qwen3.5", "recurrent-gemma"]))
def test_lora(name):
    peft = pytest.importorskip("peft")
    layers = ["in_proj_qkv", "in_proj_a", "out_proj", "linear_x", "linear_out"]
    config, dpos = peft.LoraConfig(r=2, target_modules=layers), []
    for share in (True, False):
        with seeded(0):
            dpos.append(DPO(peft.get_peft_model(SHAREABLE[name](0), config), share_prefix=share))
            for key, p in dpos[-1].named_parameters():
                p.data += torch.randn_like(p) * ("lora_B" in key)
        to_float64(dpos[-1])
    assert dpos[0].ref_model is None  # the reference is the policy with its adapter off
    with ExactFloat64():
        results, expected = (loss_and_gradients(dpo, CASES[1]) for dpo in dpos)
    assert_close(results, expected, 1e-10)
    assert abs(results["logps/chosen"] - results["logps/ref_chosen"]) > 1e-2
    assert shares_prefix(dpos[0])


NARROW = [(name, mode) for name in RECURRENT for mode in ("autocast", "bfloat16")]
NARROW.remove(("xlstm", "bfloat16"))  # which transformers cannot train


@contextlib.contextmanager
def narrow(mode: str, *dpos: DPO) -> Iterator[None]:
    """Autocast, or the weights in bfloat16."""
    for dpo in dpos:
        dpo.to(torch.bfloat16 if mode == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        yield


@pytest.mark.parametrize(
    "name, mode", mark_slow_except([("qwen3.5", "bfloat16"), ("mamba2", "autocast")], NARROW)
)
def test_narrow_dtypes(name, mode):
    shared, padded = (make_dpo(SHAREABLE[name], share) for share in (True, False))
    with narrow(mode, shared, padded):
        results, expected = loss_and_gradients(shared, CASES[2]), loss_and_gradients(padded, CASES[2])

    def log_probs(values: dict[str, Tensor]) -> Tensor:
        return torch.stack([values["logps/chosen"], values["logps/rejected"]])

    assert torch.allclose(log_probs(results), log_probs(expected), rtol=0.02)
    gradients = [key for key in expected if key.startswith("gradient")]
    norm = sum(expected[key].double().square().sum() for key in gradients) ** 0.5
    error = sum((results[key] - expected[key]).double().square().sum() for key in gradients) ** 0.5
    assert shares_prefix(shared) and error < 0.2 * norm, float(error / norm)


@pytest.mark.parametrize("name", ["lfm2", "minimax"])
def test_train_mode_and_no_gradients(name):
    shared, padded = (make_dpo(SHAREABLE[name], share) for share in (True, False))
    for dpo in (shared, padded):
        dpo.train()
    assert_close(loss_and_gradients(shared, CASES[1]), loss_and_gradients(padded, CASES[1]), 3e-5)
    with torch.no_grad():
        assert abs(shared(**arguments(CASES[2])) - padded(**arguments(CASES[2]))) < 1e-5
    assert shares_prefix(shared)
