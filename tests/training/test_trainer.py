"""The training loop: the order of the examples, and steps that are split."""

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.batches.sequences import ScoredTreeTokens
from dpo_wrapper.scoring import Scorer
from dpo_wrapper.training import stages
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Trainer
from helpers.runs import (
    assert_metrics_close,
    interrupt_training,
    make_config,
    read_metrics,
    train_in_two_processes,
)


@pytest.mark.slow
@pytest.mark.pitfall(23)
@pytest.mark.parametrize("micro_batch_tokens", [1, 250])
def test_micro_batches_give_the_same_update(finished_run, rows, tmp_path, micro_batch_tokens):
    train(make_config(rows, tmp_path / "out", micro_batch_tokens=micro_batch_tokens))
    expected, actual = (load_file(path / "model.safetensors") for path in (finished_run, tmp_path / "out"))
    for name in expected:
        assert torch.allclose(expected[name], actual[name], atol=2e-5), name
    assert_metrics_close(read_metrics(finished_run), read_metrics(tmp_path / "out"))


@pytest.mark.slow
def test_workers_load_the_same_batches(finished_run, rows, tmp_path):
    train(make_config(rows, tmp_path / "out", num_workers=2))
    assert read_metrics(tmp_path / "out") == read_metrics(finished_run)


@pytest.mark.slow
@pytest.mark.pitfall(22)
def test_two_processes_report_what_one_does(finished_run, rows, tmp_path):
    """Uneven: 21 train pairs in steps of 4 leave a step of one pair, for two processes."""
    out = tmp_path / "out"
    train_in_two_processes(tmp_path / "script.py", rows, out)
    assert_metrics_close(read_metrics(finished_run), read_metrics(out))


@pytest.mark.slow
@pytest.mark.parametrize("is_resumed", [False, True])
def test_trees_are_laid_out_once_as_the_model_takes_them(rows, tmp_path, monkeypatch, is_resumed):
    config = make_config(rows, tmp_path / "out", save_steps=2)
    if is_resumed:
        with interrupt_training("dpo", after_steps=3):
            train(config)
        config = make_config(rows, tmp_path / "out", save_steps=2, resume=True)
    built, is_computing = [], False
    from_sequences = ScoredTreeTokens.from_sequences

    def recorded(sequences, options):
        built.append(is_computing)
        return from_sequences(sequences, options)

    def computing(function, value=True):
        def wrapped(*args):
            nonlocal is_computing
            before, is_computing = is_computing, value
            try:
                return function(*args)
            finally:
                is_computing = before

        return wrapped

    monkeypatch.setattr(ScoredTreeTokens, "from_sequences", recorded)
    monkeypatch.setattr(Trainer, "train_step", computing(Trainer.train_step))
    monkeypatch.setattr(Scorer, "check", computing(Scorer.check, False))  # a probe has trees of its own
    for stage in (stages.SFTStage, stages.DPOStage):
        monkeypatch.setattr(stage, "evaluate", computing(stage.evaluate))
    train(config)
    assert len(built) > 10 and not any(built)


@pytest.mark.slow
@pytest.mark.parametrize("precomputes", [False, True])
def test_micro_batch_tokens_bound_padded_rows(rows, tmp_path, monkeypatch, precomputes):
    """In training, evaluation, the cache and the precomputed reference."""

    class PaddedScorer(Scorer):
        def __init__(self, model, impl="auto", share_prefix=False, *args, **kwargs):
            super().__init__(model, impl, False, *args, **kwargs)

        def __call__(self, sequences, *args, **kwargs):
            passes.append((len(sequences.ids), sequences.ids.numel()))
            return super().__call__(sequences, *args, **kwargs)

    passes: list[tuple[int, int]] = []
    for module in ("dpo_wrapper.dpo", "dpo_wrapper.training.stages", "dpo_wrapper.training.train"):
        monkeypatch.setattr(f"{module}.Scorer", PaddedScorer)
    options = {"micro_batch_tokens": 400, "batch_size": 16, "epochs": 1, "save_steps": 0}
    train(make_config(rows, tmp_path / "out", precompute_ref_log_probs=precomputes, **options))
    assert any(sequences > 2 for sequences, _ in passes)
    assert all(padded_tokens <= 400 or sequences <= 2 for sequences, padded_tokens in passes)
