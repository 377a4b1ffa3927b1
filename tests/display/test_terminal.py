"""The progress bars of a run."""

import io

import pytest
import tqdm

from dpo_wrapper.display.terminal import create_progress_bar
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from helpers.runs import SMALL_DECODER, make_config


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that are made, as they are seen in a terminal."""
    made = []

    class RecordedBar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**(options | {"disable": False, "file": io.StringIO()}))
            made.append(self)

    monkeypatch.setattr(tqdm, "tqdm", RecordedBar)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"ref_model_sync_steps": 2}])
def test_all_that_takes_time_has_a_bar_that_fills(rows, tmp_path, bars, monkeypatch, options):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    watched = {"samples": 2, "sample_steps": 3, "exact_answers": 2, "save_steps": 3, "eval_steps": 3}
    train(make_config(rows, tmp_path / "out", epochs=1, **(watched | options)))
    counted = {bar.desc for bar in bars if bar.total is not None}
    expected = {
        f"evaluating {split} {unit}" for split in ("eval", "train") for unit in ("completions", "pairs")
    }
    expected |= {"SFT", "DPO", "answering eval prompts", "writing samples"}
    if "precompute_ref_log_probs" in options:
        expected |= {"reference, train", "reference, eval"}
    assert {desc.removesuffix(": ") for desc in counted} == expected
    for bar in bars:
        if bar.total is not None:
            assert 0 < bar.n == bar.total, bar.desc
    others = [str(bar) for bar in bars if bar.total is None]
    assert set(others) == {"writing a checkpoint …", "saving the model …"}
    assert others.count("saving the model …") == 2  # after each stage


def test_in_a_file_no_bar_is_seen(capsys):
    with create_progress_bar("evaluating", "batch", total=3) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")
