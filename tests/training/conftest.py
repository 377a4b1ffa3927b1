"""A small decoder for all training tests, and a finished run that they compare theirs with."""

import pytest

from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.train import train
from helpers.curves import rendered_curves
from helpers.runs import SMALL_DECODER, make_config


@pytest.fixture(autouse=True)
def small_decoder(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)


@pytest.fixture(scope="session")
def finished_run(rows, tmp_path_factory):
    """The folder of a run on pairs, without checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with rendered_curves(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        train(make_config(rows, folder, save_steps=0))
    return folder
