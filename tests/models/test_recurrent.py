"""Which layers carry a state along the sequence."""

import pytest
from torch import nn

from dpo_wrapper.models.recurrent import find_recurrent_layers
from helpers.models import ZOO
from helpers.shareable_models import hf


@pytest.mark.parametrize("name", ["hf-llama", "hf-gpt2", "xt-rotary", "plain-transformer"])
def test_models_of_attention_alone_have_none(name):
    assert find_recurrent_layers(ZOO[name](0)) == []


@pytest.mark.parametrize(
    ("family", "options", "layers"),
    [
        ("Mamba", {"state_size": 8}, ["MambaMixer"]),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, ["Lfm2ShortConv"]),
        ("Rwkv", {"attention_hidden_size": 16}, ["RwkvSelfAttention"]),
        ("RecurrentGemma", {"lru_width": 16}, ["RecurrentGemmaRecurrentBlock", "RecurrentGemmaRglru"]),
    ],
)
def test_layers_with_a_state_are_named_by_their_class(family, options, layers):
    assert find_recurrent_layers(hf(family, **options)(0)) == layers


def test_a_convolution_that_mixes_channels_is_none():
    """As those that cut a picture or a sound into tokens."""
    assert find_recurrent_layers(nn.Sequential(nn.Conv1d(4, 8, 3))) == []
    assert find_recurrent_layers(nn.Sequential(nn.Conv1d(4, 4, 3, groups=4))) == ["Sequential"]
