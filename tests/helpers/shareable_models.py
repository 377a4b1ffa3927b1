"""Tiny models that can share prefixes and some that cannot, and `DPO` with and without sharing."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Generator, Tensor, nn

from dpo_wrapper import DPO
from helpers import models
from helpers.batches import Case, random_batch
from helpers.dpo_calls import arguments, nudged
from helpers.models import CONTEXT, DIM, ROTARY, VOCAB, ZOO, randomise_, seeded, x_transformer
from helpers.oracle import to_float64

Make = Callable[[int], nn.Module]


def xt(**kwargs: Any) -> Make:
    """Makes x-transformers' models: `xt(decoder=...)(seed)`."""
    return partial(x_transformer, **kwargs)


def hf(family: str, attention: str | None = None, config_suffix: str = "Config", **kwargs: Any) -> Make:
    """Makes transformers' models, with an attention implementation: `hf("Llama", "eager")(seed)`."""

    def make(seed: int) -> nn.Module:
        sizes: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        sizes |= dict(hidden_size=DIM, intermediate_size=32, num_hidden_layers=models.DEPTH)
        sizes |= dict(num_attention_heads=2, num_key_value_heads=1)
        sizes |= dict(max_position_embeddings=CONTEXT, vocab_size=VOCAB)
        config = getattr(transformers, family + config_suffix)(**sizes | kwargs)
        config._attn_implementation = attention
        config._experts_implementation = "eager"  # the grouped product has no float64
        with seeded(seed):
            return randomise_(getattr(transformers, f"{family}ForCausalLM")(config)).train()

    return make


NO_TABLE = dict(use_abs_pos_emb=False)
GEMMA2 = dict(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0, attn_logit_softcapping=5.0)
EXPERTS = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
AFMOE = EXPERTS | dict(head_dim=8, num_dense_layers=1, sliding_window=3)

LATENT = dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
SPARSE = (
    LATENT
    | EXPERTS
    | dict(  # a query attends to the few keys that an index finds
        q_lora_rank=8,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
    )
)


DELTA_NET = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8
)
QWEN = DELTA_NET | dict(head_dim=8, layer_types=["linear_attention", "full_attention"])
SHARED_EXPERT = EXPERTS | dict(shared_expert_intermediate_size=8)
KIMI = (
    LATENT
    | EXPERTS
    | dict(
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        num_local_experts=3,
        num_key_value_heads=2,
        linear_num_heads=2,
        linear_head_dim=8,
    )
)
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16)
JAMBA = dict(attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2)

FORK, PATHS = "layers pass their state on to each branch", "layers run along each path"
RECURRENT: dict[str, tuple[Make, str]] = {  # with what is told of their layers that carry a state
    "qwen3.5": (hf("Qwen3_5", config_suffix="TextConfig", **QWEN), f"Qwen3_5GatedDeltaNet {FORK}"),
    "qwen3.5-moe": (
        hf("Qwen3_5Moe", config_suffix="TextConfig", **QWEN | SHARED_EXPERT),
        f"Qwen3_5MoeGatedDeltaNet {FORK}",
    ),
    "qwen3-next": (hf("Qwen3Next", **QWEN | SHARED_EXPERT), f"Qwen3NextGatedDeltaNet {FORK}"),
    "kimi-linear": (hf("KimiLinear", **KIMI), f"KimiLinearDeltaAttention {FORK}"),
    "falcon-h1": (hf("FalconH1", mamba_d_ssm=32, head_dim=8, **MAMBA2), f"FalconH1Mixer {FORK}"),
    "lfm2": (hf("Lfm2", layer_types=["conv", "full_attention"]), f"Lfm2ShortConv {FORK}"),
    "mamba2": (
        hf("Mamba2", num_heads=4, head_dim=8, state_size=8, n_groups=2, expand=2, chunk_size=16),
        f"Mamba2Mixer {FORK}",
    ),
    "mamba": (hf("Mamba", state_size=4), f"MambaMixer {FORK}"),
    "jamba": (hf("Jamba", num_experts=2, mamba_d_state=4, **JAMBA), f"JambaMambaMixer {FORK}"),
    "granite-hybrid": (
        hf(
            "GraniteMoeHybrid",
            layer_types=["mamba", "attention"],
            num_local_experts=3,
            num_experts_per_tok=2,
            shared_intermediate_size=8,
            mamba_n_groups=1,
            **MAMBA2,
        ),
        f"GraniteMoeHybridMambaLayer {FORK}",
    ),
    "recurrent-gemma": (
        hf("RecurrentGemma", lru_width=DIM, attention_window_size=16, head_dim=8, num_hidden_layers=3),
        f"RecurrentGemmaRecurrentBlock {PATHS}",
    ),
    "minimax": (
        hf("MiniMax", layer_types=["linear_attention", "full_attention"], num_local_experts=3, block_size=8),
        f"MiniMaxLightningAttention {PATHS}",
    ),
    "xlstm": (hf("xLSTM", num_heads=2, chunk_size=8, ffn_round_up_to_multiple_of=8), f"xLSTMLayer {PATHS}"),
    "xt-shift": (xt(decoder=dict(shift_tokens=1)), f"ShiftTokens {FORK}"),
    "xt-shifts": (xt(decoder=ROTARY | dict(shift_tokens=3, attn_flash=True)), f"ShiftTokens {FORK}"),
    "xt-gru": (
        xt(decoder=dict(attn_hybrid_module=nn.GRU(DIM, DIM, batch_first=True), attn_hybrid_fold_axial_dim=1)),
        f"FoldAxially {PATHS}",
    ),
}

SHAREABLE: dict[str, Make] = {
    **{name: make for name, make in ZOO.items() if not name.startswith("plain")},
    **{name: make for name, (make, _) in RECURRENT.items()},
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
    "gemma2": hf("Gemma2", "eager", sliding_window=3, **GEMMA2),
    "mixtral": hf("Mixtral", num_local_experts=3, num_experts_per_tok=2),
    "afmoe": hf("Afmoe", "sdpa", **AFMOE),  # passes `attention_mask` by its name
    "afmoe-eager": hf("Afmoe", "eager", **AFMOE),
    "dory": hf("Dory"),
    # these tell their attention of the window by the mask alone, and it is longer than the probe's sequences
    "qwen2-moe": hf("Qwen2Moe", use_sliding_window=True, sliding_window=16, max_window_layers=1, **EXPERTS),
    "phimoe": hf("Phimoe", "eager", sliding_window=16, num_local_experts=2, num_experts_per_tok=1),
}

DIFFERS = "log-probs would differ"
ELSEWHERE = "elsewhere than in transformers' attention interface"
CHUNKS = dict(layer_types=["chunked_attention", "full_attention"], attention_chunk_size=16, moe_layers=[])
NOT_SHAREABLE: dict[str, tuple[Make, str]] = {  # with a part of the reason that is given
    "memory-tokens": (xt(num_memory_tokens=2), "rows of shape"),
    "memory-kv": (xt(decoder=dict(attn_num_mem_kv=2)), "memory key/values"),
    "residual-attention": (xt(decoder=dict(residual_attn=True)), "adds the scores of the layer before"),
    "dynamic-alibi": (xt(decoder=dict(attn_data_dependent_alibi=True)), "depends on the data"),
    "plain-gru": (ZOO["plain-gru"], "plain module"),
    "bloom": (hf("Bloom", n_head=2), ELSEWHERE),
    "zaya": (
        hf("Zaya", head_dim=8, router_hidden_size=8, num_experts=3),
        "a second output of layers with a state",
    ),
    "llama4": (hf("Llama4", config_suffix="TextConfig", head_dim=8, **CHUNKS), "than by a sliding window"),
    # with SDPA attention, transformers before 5.18 hands it no causal mask
    "doge": (hf("Doge", "eager"), "mask of its own"),
    "deepseek-v3.2": (hf("DeepseekV32", **SPARSE), "use the attention mask"),
    "ax-k2": (hf("AXK2", **SPARSE), "use the attention mask"),
    "glm-dsa": (hf("GlmMoeDsa", **SPARSE), "use the attention mask"),
}


def batch_with_shared_prefixes(b: int = 5, n: int = 20) -> Case:
    """Pairs with one system prompt, a prompt for each pair, equal pairs, and equal sides."""
    generator = Generator().manual_seed(9)
    seqs = torch.randint(0, VOCAB, (2, b, n), generator=generator)
    seqs[:, :, :6], seqs[1, :, 6:10] = seqs[0, 0, :6].clone(), seqs[0, :, 6:10]
    real = torch.arange(n) < torch.randint(9, n + 1, (2, b, 1), generator=generator)
    seqs[:, 2:3], real[:, 2:3] = seqs[:, 1:2], real[:, 1:2]
    seqs[1, 3:4], real[1, 3:4] = seqs[0, 3:4], real[0, 3:4]
    prompt = torch.arange(n).expand(b, -1) < 8
    return Case(seqs[0], seqs[1], (prompt, prompt), (real[0], real[1]))


CASES = [
    random_batch(Generator().manual_seed(4), b=4),
    batch_with_shared_prefixes(),
    batch_with_shared_prefixes(b=4, n=CONTEXT),
]


def make_dpo(
    make: Make,
    share_prefix: Any = True,
    *,
    exact: bool = False,
    make_reference: Make | None = None,
) -> DPO:
    """A DPO whose policy has moved away from its reference; `exact` is for use under `ExactFloat64`."""
    models = (make(0), (make_reference or make)(0))
    policy, reference = (to_float64(model) if exact else model.eval() for model in models)
    return DPO(nudged(policy, 0.05), reference=reference, beta=0.3, share_prefix=share_prefix)


def loss_and_gradients(dpo: DPO, case: Case) -> dict[str, Tensor]:
    """Loss, metrics and every gradient, by name."""
    loss, metrics = dpo(**arguments(case), return_metrics=True)
    parameters = [p for p in dpo.policy_model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach()} | metrics | {f"gradient {k}": grad for k, grad in enumerate(grads)}


def assert_close(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """That two of `loss_and_gradients` agree."""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(results[name], value, atol=tolerance, rtol=tolerance), name


def held_attributes(dpo: DPO) -> list[dict[str, Any]]:
    """What the modules and configurations of policy and reference hold, by identity."""
    modules = [*dpo.policy_model.modules(), *dpo.ref_model.modules()]
    held = [{**vars(m), **vars(getattr(m, "config", m))} for m in modules]

    def describe(value: Any) -> Any:
        if isinstance(value, dict):
            return list(value)
        if isinstance(value, list):  # torch's recurrent layers make a new one whenever a weight is set
            return [id(item()) if isinstance(item, weakref.ref) else id(item) for item in value]
        return id(value)

    return [{name: describe(value) for name, value in attributes.items()} for attributes in held]
