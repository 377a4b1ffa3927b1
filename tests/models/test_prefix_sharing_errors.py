"""Models that cannot share prefixes are padded, or refused; mistakes in a tree are caught by the probe."""

import warnings

import pytest
import torch

from dpo_wrapper.models import hugging_face_attention, x_transformers
from dpo_wrapper.prefix_tree import TreeLayout
from helpers.dpo_calls import arguments
from helpers.marks import mark_slow_except
from helpers.shareable_models import (
    CASES,
    DIFFERS,
    NOT_SHAREABLE,
    SHAREABLE,
    assert_close,
    loss_and_gradients,
    make_dpo,
)


@pytest.mark.parametrize(
    "name",
    mark_slow_except(
        ["shift-tokens", "memory-kv", "dynamic-alibi", "plain-gru", "bloom", "lfm2", "doge", "glm-dsa"],
        NOT_SHAREABLE,
    ),
)
def test_models_that_mix_tokens_elsewhere_fall_back(name):
    make, reason = NOT_SHAREABLE[name]
    auto, padded = make_dpo(make, "auto"), make_dpo(make, False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = loss_and_gradients(auto, CASES[2])
    messages = [str(w.message) for w in caught if "prefixes are not shared" in str(w.message)]
    assert len(messages) == (0 if reason == "plain module" else 2)  # policy and reference, once each
    assert all(reason in message for message in (auto.explain(), *messages))
    assert_close(results, loss_and_gradients(padded, CASES[2]), 1e-6)
    with pytest.raises(ValueError, match=f"not shared.*{reason}.*use share_prefix = 'auto'"):
        make_dpo(make)(**arguments(CASES[1]))


@pytest.mark.pitfall(13)
@pytest.mark.parametrize("name", ["xt-absolute", "xt-rotary", "xt-polar", "llama-eager", "hf-gpt2", "hf-opt"])
def test_positions_that_are_not_reset_are_caught(name, monkeypatch):
    from_tree = TreeLayout.from_tree

    def with_running_positions(tree, options):
        layout = from_tree(tree, options)
        positions = torch.arange(layout.ids.numel()).view(layout.ids.shape)
        layout.position.copy_(positions % (options.max_positions or 10**9))
        return layout

    monkeypatch.setattr(TreeLayout, "from_tree", with_running_positions)
    with pytest.raises(ValueError, match=DIFFERS):
        make_dpo(SHAREABLE[name])(**arguments(CASES[1]))


@pytest.mark.pitfall(13)
@pytest.mark.parametrize("name", ["xt-no-positions", "xt-alibi", "xt-rotary-flash", "hf-llama", "gemma2"])
def test_branches_that_see_one_another_are_caught(name, monkeypatch):
    def attend_as_one_sequence(layout, q, k, v, attention_fn):
        layout.kernels.add("model")
        return attention_fn(q, k, v)

    for hooks in (hugging_face_attention, x_transformers):
        monkeypatch.setattr(hooks, "attend_along_paths", attend_as_one_sequence)
        monkeypatch.setattr(hooks, "attend_with_kernel", lambda *_: None)
    with pytest.raises(ValueError, match=DIFFERS):
        make_dpo(SHAREABLE[name])(**arguments(CASES[1]))
