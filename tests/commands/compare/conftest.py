"""The small decoder of the training tests."""

import pytest

from dpo_wrapper.pretrained import PRESETS
from helpers.runs import SMALL_DECODER


@pytest.fixture
def small_decoder(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
