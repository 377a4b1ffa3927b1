"""Shared prefixes against padded rows: the same log-probs, loss and gradients, and nothing left behind."""

import contextlib
import functools
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Generator
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from dpo_wrapper import DPO
from dpo_wrapper.models import hugging_face_attention, x_transformers
from dpo_wrapper.prefix_tree import TreeLayout, cpu_attention
from helpers import models as zoo
from helpers.batches import Case, random_batch
from helpers.dpo_calls import arguments, nudged
from helpers.models import DEPTH, DIM, ROTARY, VOCAB, ZOO, x_transformer
from helpers.oracle import ExactFloat64, to_float64

xt = functools.partial(functools.partial, x_transformer)  # xt(decoder = ...) makes models
NO_TABLE = dict(use_abs_pos_emb=False)
shares = lambda dpo: dpo.score_policy.why_padded is dpo.score_reference.why_padded is None  # noqa: E731


def hf(kind, attn=None, config="Config", **kwargs):
    def make(seed):
        sizes = dict(hidden_size=DIM, intermediate_size=32, num_hidden_layers=DEPTH, num_attention_heads=2)
        sizes |= dict(num_key_value_heads=1, max_position_embeddings=zoo.CONTEXT, vocab_size=VOCAB)
        made = getattr(transformers, kind + config)(**sizes | dict.fromkeys(TOKENS, 0) | kwargs)
        made._attn_implementation = attn
        made._experts_implementation = "eager"  # the grouped product has no float64
        with zoo.seeded(seed):
            return zoo.randomise_(getattr(transformers, f"{kind}ForCausalLM")(made)).train()

    return make


TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
gemma2 = dict(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0, attn_logit_softcapping=5.0)
experts = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
SHAREABLE = {name: make for name, make in ZOO.items() if not name.startswith("plain")} | {
    "xt-alibi-flash": xt(decoder=dict(alibi_pos_bias=True, attn_flash=True), **NO_TABLE),
    "xt-qk-norm": xt(decoder=dict(attn_qk_norm=True)),
    "xt-grouped-query": xt(decoder=dict(attn_kv_heads=1)),
    "xt-talking-heads": xt(decoder=dict(attn_pre_talking_heads=True, attn_post_talking_heads=True)),
    "xt-softclamp": xt(decoder=dict(attn_softclamp_logits=True, attn_logit_softclamp_value=2.0)),
    "xt-window": xt(decoder=dict(attn_max_attend_past=3)),
    "xt-window-flash": xt(decoder=ROTARY | dict(attn_max_attend_past=3, attn_flash=True)),
    "xt-value-residual": xt(decoder=dict(add_value_residual=True)),
    "xt-t5": xt(decoder=dict(rel_pos_bias=True), **NO_TABLE),
    "xt-polar": xt(decoder=dict(polar_pos_emb=True)),
    "xt-no-positions": xt(**NO_TABLE),
    "llama-eager": hf("Llama", "eager"),
    "qwen2": hf("Qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": hf("Qwen3", head_dim=8),
    "mistral": hf("Mistral", "sdpa", sliding_window=3),
    "mistral-eager": hf("Mistral", "eager", sliding_window=3),
    "gemma2": hf("Gemma2", "eager", sliding_window=3, **gemma2),
    "mixtral": hf("Mixtral", num_local_experts=3, num_experts_per_tok=2),
    # longer than the check's sequences: what it cannot see. These tell it by the mask alone
    "qwen2-moe": hf("Qwen2Moe", use_sliding_window=True, sliding_window=16, max_window_layers=1, **experts),
    "phimoe": hf("Phimoe", "eager", sliding_window=16, num_local_experts=2, num_experts_per_tok=1),
}


DIFFER = "log-probs would differ"
chunks = dict(layer_types=["chunked_attention", "full_attention"], attention_chunk_size=16, moe_layers=[])
MIXING = {  # with a part of the reason given
    "shift-tokens": (xt(decoder=dict(shift_tokens=1)), DIFFER),
    "memory-tokens": (xt(num_memory_tokens=2), "rows of shape"),
    "memory-kv": (xt(decoder=dict(attn_num_mem_kv=2)), "memory key/values"),
    "residual-attention": (xt(decoder=dict(residual_attn=True)), DIFFER),
    "dynamic-alibi": (xt(decoder=dict(attn_data_dependent_alibi=True)), "depends on the data"),
    "plain-gru": (ZOO["plain-gru"], "plain module"),
    "mamba": (hf("Mamba"), DIFFER),
    "lfm2": (hf("Lfm2", layer_types=["conv", "full_attention"]), DIFFER),
    "llama4": (hf("Llama4", config="TextConfig", head_dim=8, **chunks), "than by a sliding window"),
}


def whole_batch(b=5, n=20):
    """Pairs with one system prompt, a prompt for each pair, equal pairs, and equal sides."""
    generator = Generator().manual_seed(9)
    seqs = torch.randint(0, VOCAB, (2, b, n), generator=generator)
    seqs[:, :, :6], seqs[1, :, 6:10] = seqs[0, 0, :6].clone(), seqs[0, :, 6:10]
    real = torch.arange(n) < torch.randint(9, n + 1, (2, b, 1), generator=generator)
    seqs[:, 2:3], real[:, 2:3] = seqs[:, 1:2], real[:, 1:2]
    seqs[1, 3:4], real[1, 3:4] = seqs[0, 3:4], real[0, 3:4]
    prompt = torch.arange(n).expand(b, -1) < 8
    return Case(seqs[0], seqs[1], (prompt, prompt), (real[0], real[1]))


CASES = [random_batch(Generator().manual_seed(4), b=4), whole_batch(), whole_batch(b=4, n=zoo.CONTEXT)]


def numbers(dpo, case):
    """Loss and metrics, and every gradient."""
    loss, metrics = dpo(**arguments(case), return_metrics=True)
    del metrics["rewards/accuracies"]  # of equal sides it is whatever rounding says
    parameters = [p for p in dpo.policy_model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach()} | metrics | {f"gradient {k}": grad for k, grad in enumerate(grads)}


def assert_equal(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=tolerance, rtol=tolerance), name


def made(make, share=True, exact=False, reference=None):
    policy, other = (to_float64(m) if exact else m.eval() for m in (make(0), (reference or make)(0)))
    return DPO(nudged(policy, 0.05), reference=other, beta=0.3, share_prefix=share)


def state_of(dpo):
    """What the modules and configs of policy and reference hold, by identity."""
    modules = [*dpo.policy_model.modules(), *dpo.ref_model.modules()]
    held = [{**vars(m), **vars(getattr(m, "config", m))} for m in modules]
    return [{k: list(v) if isinstance(v, dict) else id(v) for k, v in of.items()} for of in held]


@pytest.fixture(params=["model", "branches"])
def each_kernel(request, monkeypatch):
    """Plain attention on the CPU by the model along each path, and by torch's kernel on each branch."""
    monkeypatch.setattr(cpu_attention, "MIN_BRANCH_NUMEL", 0 if request.param == "branches" else math.inf)


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("exact", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", SHAREABLE)
def test_shared_prefixes_change_no_log_prob_loss_or_gradient(name, exact):
    shared, padded = (made(SHAREABLE[name], share, exact) for share in (True, False))
    for case in CASES:
        with ExactFloat64() if exact else contextlib.nullcontext():
            got, expected = numbers(shared, case), numbers(padded, case)
        assert_equal(got, expected, 1e-10 if exact else 3e-5)
    assert shares(shared) and not shares(padded)
    assert max(g.abs().max() for n, g in got.items() if n.startswith("gradient")) > 1e-3


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_tokens_elsewhere_fall_back(name):
    make, reason = MIXING[name]
    auto, padded = made(make, "auto"), made(make, False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = numbers(auto, CASES[2])
    told = [str(w.message) for w in caught if "prefixes are not shared" in str(w.message)]
    assert len(told) == (0 if reason == "plain module" else 2)  # policy and reference, once each
    assert all(reason in message for message in (auto.explain(), *told))
    assert_equal(got, numbers(padded, CASES[2]), 1e-6)
    with pytest.raises(ValueError, match=f"not shared.*{reason}.*use share_prefix = 'auto'"):
        made(make)(**arguments(CASES[1]))


@pytest.mark.pitfall(13)
@pytest.mark.parametrize("name", ["xt-absolute", "xt-rotary", "xt-polar", "llama-eager", "hf-gpt2", "hf-opt"])
def test_positions_that_are_not_reset_are_caught(name, monkeypatch):
    right = TreeLayout.from_tree

    def wrong(tree, options):
        layout = right(tree, options)
        positions = torch.arange(layout.ids.numel()).view(layout.shape)
        layout.position.copy_(positions % (options.max_positions or 10**9))
        return layout

    monkeypatch.setattr(TreeLayout, "from_tree", wrong)
    with pytest.raises(ValueError, match=DIFFER):
        made(SHAREABLE[name])(**arguments(CASES[1]))


@pytest.mark.pitfall(13)
@pytest.mark.parametrize("name", ["xt-no-positions", "xt-alibi", "xt-rotary-flash", "hf-llama", "gemma2"])
def test_branches_that_see_one_another_are_caught(name, monkeypatch):
    for hooks in (hugging_face_attention, x_transformers):
        monkeypatch.setattr(
            hooks, "attend_along_paths", lambda layout, q, k, v, attention: attention(q, k, v)
        )
        monkeypatch.setattr(hooks, "attend_with_kernel", lambda *_: None)
    with pytest.raises(ValueError, match=DIFFER):
        made(SHAREABLE[name])(**arguments(CASES[1]))


@pytest.mark.parametrize("name", ["xt-absolute", "xt-polar", "hf-gpt2", "hf-opt"])
def test_trees_larger_than_the_table_of_positions_are_folded(name):
    shared, padded = (made(SHAREABLE[name], share, True) for share in (True, False))
    case = whole_batch(b=20, n=zoo.CONTEXT)
    with ExactFloat64():
        got, expected = numbers(shared, case), numbers(padded, case)
    assert_equal(got, expected, 1e-10)
    assert got["tokens/unique"] > 300 > zoo.CONTEXT and shares(shared)


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("name", ["xt-alibi", "xt-window", "hf-llama", "hf-gpt2", "gemma2"])
def test_nothing_is_left_behind(name):
    dpo, fails = made(SHAREABLE[name]), []
    last = [m for m in dpo.policy_model.modules() if "attention" in type(m).__name__.lower()][-1]
    last.register_forward_hook(lambda *_: 1 / 0 if fails else None)
    before, expected = state_of(dpo), numbers(dpo, CASES[1])
    assert state_of(dpo) == before
    fails.append(True)
    with pytest.raises(ZeroDivisionError):
        dpo(**arguments(CASES[1]))
    assert state_of(dpo) == before and not fails.clear()
    assert_equal(numbers(dpo, CASES[1]), expected, 0)


@pytest.mark.pitfall(24)
@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["hf-llama", "hf-gpt2", "gemma2", "mistral"])
def test_gradient_checkpointing(name, reentrant):
    dpo = made(SHAREABLE[name])
    model, ids = dpo.policy_model, CASES[1].preferred_seq
    expected, logits = numbers(dpo, CASES[1]), model(input_ids=ids).logits
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    calls = []
    for k, layer in enumerate(m for m in model.modules() if type(m).__name__.endswith("Attention")):
        layer.register_forward_pre_hook(lambda *_, k=k: calls.append(k))
    loss = dpo(**arguments(CASES[1]))
    assert sorted(calls) == list(range(DEPTH))
    loss.backward()
    assert sorted(calls) == sorted([*range(DEPTH)] * 2)  # the layers ran again
    for k, p in enumerate(model.parameters()):
        assert torch.allclose(p.grad, expected[f"gradient {k}"], atol=1e-6)
    assert torch.equal(model(input_ids=ids).logits, logits)
    model.gradient_checkpointing_disable()
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert "dpo_wrapper" not in model.config.to_json_string()


@pytest.mark.pitfall(24)
@pytest.mark.filterwarnings("ignore:prefixes are not shared")
@pytest.mark.parametrize("name", ["hf-llama", "xt-rotary"])
def test_layers_wrapped_for_checkpointing(name):
    expected = numbers(made(ZOO[name]), CASES[1])
    policy = nudged(ZOO[name](0), 0.05)
    layers = ("LlamaDecoderLayer", "Attention")
    apply_activation_checkpointing(policy, check_fn=lambda m: type(m).__name__ in layers)
    dpo = DPO(policy, reference=ZOO[name](0), beta=0.3)
    assert_equal(numbers(dpo, CASES[1]), expected, 3e-5)
    assert ("run again" in dpo.explain()) == (name == "xt-rotary")


def compiled(model, parts):
    for module in model.modules():
        if type(module).__name__ in parts:
            module.compile(backend="eager")
    return model


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize(
    "name, parts",
    [
        ("hf-llama", ["LlamaModel"]),
        ("hf-llama", ["LlamaDecoderLayer"]),
        ("hf-llama", ["LlamaMLP"]),
        ("xt-rotary-flash", ["AttentionLayers", "Decoder"]),
        ("xt-rotary-flash", ["FeedForward"]),
    ],
)
def test_compiled_parts(name, parts):
    expected = numbers(made(ZOO[name]), CASES[1])
    torch._dynamo.reset()
    dpo = made(lambda seed: compiled(ZOO[name](seed), parts))
    assert any(m._compiled_call_impl is not None for m in dpo.policy_model.modules())
    assert_equal(numbers(dpo, CASES[1]), expected, 3e-5)
    assert shares(dpo)


@pytest.mark.usefixtures("each_kernel")
def test_lora():
    peft = pytest.importorskip("peft")
    config, dpos = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]), []
    for share in (True, False):
        with zoo.seeded(0):
            dpos.append(DPO(peft.get_peft_model(ZOO["hf-llama"](0), config), share_prefix=share))
            for name, p in dpos[-1].named_parameters():
                p.data += torch.randn_like(p) * ("lora_B" in name)
    assert dpos[0].ref_model is None  # the reference is the policy with its adapter off
    for case in CASES:
        assert_equal(got := numbers(dpos[0], case), numbers(dpos[1], case), 3e-5)
    of_base = numbers(DPO(ZOO["hf-llama"](0)), case)["logps/chosen"]
    assert abs(of_base - got["logps/ref_chosen"]) < 1e-4 < 1e-2 < abs(of_base - got["logps/chosen"])
    assert shares(dpos[0])


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("name", ["xt-rotary-flash", "xt-t5", "hf-llama", "gemma2", "hf-opt"])
def test_autocast(name):
    shared, padded = (made(SHAREABLE[name], share) for share in ("auto", False))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = numbers(shared, CASES[2]), numbers(padded, CASES[2])
    assert shares(shared)
    assert abs(got["loss"] - expected["loss"]) < 0.03
    assert abs(got["logps/chosen"] - expected["logps/chosen"]) < 0.01 * abs(expected["logps/chosen"])


@pytest.mark.usefixtures("each_kernel")
@pytest.mark.parametrize("warm", [True, False], ids=["after-a-call", "from-the-first-call"])
@pytest.mark.parametrize("name", ["xt-rotary", "xt-alibi", "hf-llama"])
def test_two_threads(name, warm, request):
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    expected = [numbers(made(SHAREABLE[name]), case) for case in CASES[1:]]
    for _ in range(3):
        dpo = made(SHAREABLE[name])
        if warm:
            dpo(**arguments(CASES[0]))
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(functools.partial(numbers, dpo), CASES[1:]))
        assert shares(dpo)
        for got, alone in zip(results, expected, strict=True):
            assert_equal(got, alone, 3e-5)


@pytest.mark.filterwarnings("ignore:prefixes are not shared")
@pytest.mark.parametrize("reference", ["hf-llama", "hf-gpt2", "xt-alibi", "shift-tokens", "plain-gru"])
@pytest.mark.parametrize("policy", ["xt-rotary", "gemma2"])
def test_policy_and_reference_of_different_families(policy, reference):
    other = SHAREABLE.get(reference) or MIXING[reference][0]
    shared, padded = (made(SHAREABLE[policy], share, reference=other) for share in ("auto", False))
    before = state_of(shared)
    for case in (*CASES, *CASES):
        assert_equal(numbers(shared, case), numbers(padded, case), 3e-5)
    assert state_of(shared) == before
    assert shared.score_policy.why_padded is None and shares(shared) == (reference in SHAREABLE)


@pytest.mark.parametrize("name", ["xt-absolute", "hf-llama"])
def test_batches_of_nothing_of_one_pair_and_of_equal_sides(name):
    shared, padded = (made(SHAREABLE[name], share) for share in (True, False))
    one, case = whole_batch(b=1), CASES[1]
    nothing = replace(case, prompt_masks=tuple(torch.ones_like(mask) for mask in case.prompt_masks))
    equal = replace(case, unpreferred_seq=case.preferred_seq, seq_masks=(case.seq_masks[0],) * 2)
    for batch in (nothing, one, equal, nothing):
        assert_equal(numbers(shared, batch), numbers(padded, batch), 3e-5)
    assert abs(numbers(shared, equal)["loss"] - 0.6931472) < 1e-6
    assert numbers(shared, nothing)["loss"] == 0 and shares(shared)
