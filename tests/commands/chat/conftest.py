"""Tiny models to talk with."""

import pytest

from dpo_wrapper.pretrained import PRESETS
from helpers.lora_runs import save_decoder, save_llama
from helpers.runs import SMALL_DECODER


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A Llama that reads bytes, and has no chat template."""
    pytest.importorskip("transformers")
    return save_llama(tmp_path_factory.mktemp("chat") / "llama")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """A decoder of x-transformers that reads bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        return save_decoder(tmp_path_factory.mktemp("chat") / "decoder")
