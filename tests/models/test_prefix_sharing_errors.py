"""Models that cannot share prefixes are padded, or refused; mistakes in a tree are caught by the probe."""

import re
import warnings

import pytest
import torch

from dpo_wrapper.models import hugging_face_attention, recurrent, x_transformers
from dpo_wrapper.prefix_tree import TreeLayout
from helpers.broken_trees import detach_states, forget_states, mix_branches, require_forks
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
        ["memory-kv", "dynamic-alibi", "plain-gru", "bloom", "doge", "glm-dsa"],
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


def test_tokens_shifted_along_the_row_are_caught(monkeypatch):
    mix_branches(monkeypatch)
    with pytest.raises(ValueError, match=DIFFERS):
        make_dpo(SHAREABLE["xt-shift"])(**arguments(CASES[1]))


# layers that carry a state


MISTAKES = [
    (forget_states, "qwen3.5", "its log-probs would differ"),
    (detach_states, "qwen3.5", "its gradients would differ"),
    (detach_states, "mamba2", "its gradients would differ"),
    (mix_branches, "lfm2", "they depend on other branches of the tree"),
]


@pytest.mark.parametrize("break_tree, name, reason", mark_slow_except(MISTAKES[2:], MISTAKES))
def test_layers_run_along_paths_where_a_branch_begins_with_a_wrong_state(
    break_tree, name, reason, monkeypatch
):
    require_forks()
    break_tree(monkeypatch)
    dpo, padded = make_dpo(SHAREABLE[name]), make_dpo(SHAREABLE[name], False)
    assert_close(loss_and_gradients(dpo, CASES[1]), loss_and_gradients(padded, CASES[1]), 3e-5)
    assert re.search(rf"layers run along each path \(.*{reason}", dpo.policy.explain())


@pytest.mark.filterwarnings("ignore:prefixes are not shared in the Hugging Face model, for its log-probs")
def test_rows_are_padded_where_layers_go_wrong_along_paths_too(monkeypatch):
    require_forks()
    mix_branches(monkeypatch)
    run_along_paths = recurrent.run_along_paths
    monkeypatch.setattr(recurrent, "run_along_paths", lambda *args: run_along_paths(*args).detach())
    dpo, padded = make_dpo(SHAREABLE["lfm2"], "auto"), make_dpo(SHAREABLE["lfm2"], False)
    assert_close(loss_and_gradients(dpo, CASES[1]), loss_and_gradients(padded, CASES[1]), 3e-5)
    assert "sequences are padded, for its log-probs would differ" in dpo.policy.explain()
    with pytest.raises(ValueError, match=r"not shared .* for its log-probs would differ.*: use share_prefix"):
        make_dpo(SHAREABLE["lfm2"])(**arguments(CASES[1]))
