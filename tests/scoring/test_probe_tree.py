"""The trial of shared prefixes: what it sees in any dtype and with any weights, and what is told of it."""

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dpo_wrapper import DPO
from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.models import language_model, x_transformers
from dpo_wrapper.prefix_tree import PrefixSharingError, TreeOptions, cpu_attention
from dpo_wrapper.scoring.probe import Probe
from dpo_wrapper.scoring.probe_tree import TreeTrial
from dpo_wrapper.scoring.scorer import Scorer
from helpers.broken_trees import mix_branches, require_forks
from helpers.dpo_calls import arguments, nudged
from helpers.kernels import shares_prefix
from helpers.marks import mark_slow_except
from helpers.models import ZOO, hf_llama, seeded
from helpers.naive_dpo import ARGUMENTS, naive_loss
from helpers.shareable_models import CASES, SHAREABLE, assert_close, loss_and_gradients, make_dpo

V = 61


def fresh_hf(family: str, **kwargs: Any) -> Callable[[], nn.Module]:
    """Makes a model with the weights that transformers starts with, of a standard deviation of 0.02."""

    def make() -> nn.Module:
        sizes: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        sizes |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        sizes |= dict(num_key_value_heads=1, vocab_size=V, max_position_embeddings=256)
        with seeded(0):
            config = getattr(transformers, family + "Config")(**sizes | kwargs)
            return getattr(transformers, family + "ForCausalLM")(config)

    return make


def fresh_xt(**decoder: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from x_transformers import Decoder, TransformerWrapper

        with seeded(0):
            layers = Decoder(dim=32, depth=2, heads=2, verbose=False, **decoder)
            return TransformerWrapper(num_tokens=V, max_seq_len=256, attn_layers=layers)

    return make


LOCAL = dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8)
MAMBA = dict(mamba_n_heads=4, mamba_d_state=8)
JAMBA = dict(num_experts=2, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=4)
MIXES: dict[str, Callable[[], nn.Module]] = {
    "bloom": fresh_hf("Bloom", n_head=2, n_layer=2),
    "gpt-neo": fresh_hf("GPTNeo", **LOCAL),
    "residual-attention": fresh_xt(residual_attn=True),
    # these mix tokens where branches are mixed
    "lfm2": fresh_hf("Lfm2", layer_types=["conv", "full_attention"]),
    "shift-tokens": fresh_xt(shift_tokens=1),
    "shift-tokens-from-zero": fresh_xt(shift_tokens=1, zero_init_branch_output=True),
}
MIXES_NOT: dict[str, Callable[[], nn.Module]] = {
    "llama": fresh_hf("Llama"),
    "qwen3": fresh_hf("Qwen3", head_dim=16),
    "mixtral": fresh_hf("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "decoder": fresh_xt(),
    "from-zero": fresh_xt(rotary_pos_emb=True, zero_init_branch_output=True),
    "lfm2": fresh_hf("Lfm2", layer_types=["conv", "full_attention"]),
    "recurrent-gemma": fresh_hf("RecurrentGemma", lru_width=32, attention_window_size=16, head_dim=16),
    "falcon-h1": fresh_hf("FalconH1", mamba_d_ssm=32, mamba_d_head=8, head_dim=16, **MAMBA),
    "shift-tokens-from-zero": fresh_xt(shift_tokens=1, zero_init_branch_output=True),
    # these have no positions
    "mamba2": fresh_hf("Mamba2", num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=16),
    "jamba": fresh_hf("Jamba", **JAMBA),
}


def probe_of(model: nn.Module, mode: str) -> Probe:
    """What is found of a model in float32, in bfloat16 or under autocast."""
    rows = torch.arange(12).view(2, 6)
    sequences = ScoredSequences.from_padded(rows, rows > 0, rows >= 0)
    scorer = Scorer(model.bfloat16() if mode == "bfloat16" else model, share_prefix="auto")
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        return scorer.check(sequences)


MODES = ["float32", "bfloat16", "autocast"]
FAST_MIXES = {(name, "bfloat16") for name in MIXES}
FAST_MIXES |= {("bloom", "float32"), ("shift-tokens-from-zero", "autocast")}
FAST_MIXES_NOT = {(name, "bfloat16") for name in MIXES_NOT.keys() - {"recurrent-gemma", "falcon-h1", "jamba"}}
FAST_MIXES_NOT |= {("llama", "float32"), ("from-zero", "autocast")}


@pytest.mark.filterwarnings("ignore:prefixes are not shared")
@pytest.mark.parametrize("name, mode", mark_slow_except(FAST_MIXES, product(MIXES, MODES)))
def test_untrained_models_that_mix_tokens_are_found_in_every_dtype(name, mode, monkeypatch):
    if name == "lfm2":
        require_forks()
    mix_branches(monkeypatch)
    probe = probe_of(MIXES[name](), mode)
    reason = probe.why_padded or probe.why_along_paths
    assert reason is not None and re.search(
        "log-probs would differ|its tokens meet elsewhere|adds the scores", reason
    )


@pytest.mark.filterwarnings("ignore:prefixes are not shared")
@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_untrained_models_that_count_positions_by_themselves_are_padded(mode):
    """Whose attention is so even that in narrow dtypes wrong positions are rounding."""
    model = MIXES_NOT["llama"]()
    forward = model.model.forward
    model.model.forward = lambda *, position_ids=None, **kwargs: forward(**kwargs)
    assert "they do not depend on the positions of a tree" in str(probe_of(model, mode).why_padded)


@pytest.mark.parametrize("name, mode", mark_slow_except(FAST_MIXES_NOT, product(MIXES_NOT, MODES)))
def test_untrained_models_that_mix_no_tokens_share_prefixes_in_every_dtype(name, mode):
    assert probe_of(MIXES_NOT[name](), mode).why_padded is None


@pytest.mark.filterwarnings("ignore:prefixes are not shared")
def test_gradients_of_a_tree_are_compared_with_those_of_padded_rows(monkeypatch):
    attend = x_transformers.attend_along_paths

    def attend_with_constant_keys(layout, q, k, v, attention_fn):
        return attend(layout, q, k.detach(), v, attention_fn)

    monkeypatch.setattr(x_transformers, "attend_along_paths", attend_with_constant_keys)
    dpo, padded = make_dpo(SHAREABLE["xt-rotary"], "auto"), make_dpo(SHAREABLE["xt-rotary"], False)
    assert_close(loss_and_gradients(dpo, CASES[1]), loss_and_gradients(padded, CASES[1]), 1e-6)
    assert "its gradients would differ" in dpo.policy.explain()


def test_the_trial_of_flex_attention_has_full_blocks():
    from dpo_wrapper.prefix_tree.flex_attention import BLOCK_SIZE

    probe = Probe(torch.device("cpu"), 37, True, "auto")
    trial = TreeTrial(language_model(hf_llama(0)), probe, True)
    layout = trial.sequences().as_tree(TreeOptions(kernel="flex")).layout
    mask = layout.block_mask(None)
    assert layout.ids.shape[0] == 1 and layout.ids.shape[1] > 2 * BLOCK_SIZE
    assert int(mask.full_kv_num_blocks.max()) > 0


@pytest.mark.parametrize("changed", [0, 3])
def test_changing_a_branch_keeps_the_shape_of_the_tree(changed):
    probe = Probe(torch.device("cpu"), 37, True, "auto")
    for model in (hf_llama(0), ZOO["hf-gpt2"](0)):
        trial = TreeTrial(language_model(model), probe, True)
        trees = [trial.sequences(row).as_tree(TreeOptions()) for row in (None, changed)]
        layouts = [tree.layout for tree in trees]
        assert torch.equal(*(layout.position for layout in layouts))
        assert torch.equal(*(layout.subtree_end for layout in layouts))
        differs = (layouts[0].ids != layouts[1].ids).flatten()
        assert differs.any() and not differs.all()
        first_row = trial.longest - 1  # whose last token is no input
        assert differs[:first_row].any() == (changed == 0) and differs[first_row:].any() == (changed == 3)


# models that change after the first look


@pytest.mark.parametrize("trains_head", [True, False])
def test_a_model_that_can_no_longer_share_is_padded_from_then_on(trains_head, monkeypatch):
    def make(share: Any) -> DPO:
        dpo = make_dpo(SHAREABLE["hf-llama"], share)
        dpo.policy_model.lm_head.requires_grad_(trains_head)
        return dpo

    dpo, padded = make("auto"), make(False)
    loss_and_gradients(dpo, CASES[1])
    assert shares_prefix(dpo) and dpo.policy.trains_head == trains_head
    forward_tree = type(dpo.policy.language_model).forward_tree

    def forward_once_more(self, layout, return_hidden):
        if self is dpo.policy.language_model:
            raise PrefixSharingError("it has changed")
        return forward_tree(self, layout, return_hidden)

    monkeypatch.setattr(type(dpo.policy.language_model), "forward_tree", forward_once_more)
    with pytest.warns(
        UserWarning, match="prefixes are no longer shared .* for it has changed; its seq"
    ) as told:
        results = loss_and_gradients(dpo, CASES[1])
        loss_and_gradients(dpo, CASES[2])
    assert len([w for w in told if "no longer" in str(w.message)]) == 1
    assert_close(results, loss_and_gradients(padded, CASES[1]), 1e-5)
    assert "sequences are padded, for it has changed" in dpo.policy.explain()

    forced = make(True)
    monkeypatch.setattr(type(dpo.policy.language_model), "forward_tree", forward_tree)
    loss_and_gradients(forced, CASES[1])
    dpo = forced
    monkeypatch.setattr(type(dpo.policy.language_model), "forward_tree", forward_once_more)
    with pytest.raises(ValueError, match=r"no longer shared .* use share_prefix = 'auto'"):
        forced(**arguments(CASES[1]))


# what is told


@pytest.mark.parametrize(
    "name",
    mark_slow_except(
        ["xt-rotary", "xt-alibi", "hf-llama", "hf-gemma2", "mistral", "xt-grouped-query"],
        [name for name in SHAREABLE if name in ZOO] + ["mistral", "xt-grouped-query"],
    ),
)
def test_explain_names_the_attention_that_runs(name, monkeypatch):
    monkeypatch.setattr(cpu_attention, "MIN_BRANCH_NUMEL", 0)
    dpo = make_dpo(SHAREABLE[name])
    loss_and_gradients(dpo, CASES[1])
    probe = dpo.policy.probe
    assert probe is not None and probe.tree is not None
    explanation = dpo.policy.explain()
    assert ("torch's kernel on each long branch" in explanation.split(", for")[0]) == (
        "branches" in probe.kernels
    )
    assert ("else by the model's own" in explanation) == (probe.kernels == {"model", "branches"})
    if probe.tree.kernel == "model":
        assert probe.kernels == {"model"} and ", for it is not plain softmax attention" in explanation
    rows = ARGUMENTS["preferred_seq"]
    sequences = ScoredSequences.from_padded(rows, rows >= 0, rows >= 0)
    dpo.policy(sequences)
    assert sequences.as_tree(probe.tree).layout.kernels == probe.kernels


def test_why_a_faster_kernel_is_not_taken_is_told(monkeypatch):
    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr(cpu_attention, "attend_by_branch", fail)
    dpo = DPO(nudged(hf_llama(0)), reference=hf_llama(0).eval())
    assert torch.allclose(dpo(**ARGUMENTS), naive_loss(dpo.policy_model, dpo.ref_model), atol=1e-5)
    reason = "for torch's kernel on each long branch does not fit \\(RuntimeError: no such kernel\\);"
    assert re.search(f"by the model's own attention along each path, {reason}", dpo.explain())
