"""Tiny models, and adapters on them, to export."""

import pytest

from dpo_wrapper.pretrained import PRESETS
from helpers.exports import save_trained_adapter
from helpers.lora_runs import save_decoder, save_llama
from helpers.runs import SMALL_DECODER


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A Llama that reads bytes, with grouped heads and rotary positions of an unusual base."""
    pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 500.0}
    folder = tmp_path_factory.mktemp("export") / "llama"
    return save_llama(folder, num_key_value_heads=1, rope_parameters=rope)


@pytest.fixture(scope="session")
def adapter(llama, tmp_path_factory):
    """A LoRA adapter on it."""
    pytest.importorskip("peft")
    return save_trained_adapter(llama, tmp_path_factory.mktemp("export") / "adapter")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """A decoder of x-transformers that reads bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        return save_decoder(tmp_path_factory.mktemp("export") / "decoder")
