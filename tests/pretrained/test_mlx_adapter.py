"""Adapters that mlx-lm has made itself."""

import json

import numpy as np
import pytest
import torch

from dpo_wrapper.pretrained import load_pretrained
from helpers.exported_models import save_base

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_base(tmp_path_factory.mktemp("mlx") / "base")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 50_000.0}))
    return folder


def write_adapter(folder, **settings):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapters.safetensors").touch()
    return str(folder)


@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.up_proj", "lm_head"]], ids=["all", "some"])
def test_an_adapter_of_the_last_layer_is_loaded(keys, base, tmp_path):
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.tuner.utils")
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import load_model

    mx.random.seed(0)
    model = load_model(base)[0]
    model.freeze()
    parameters = {"rank": 3, "scale": 1.7, "dropout": 0.0} | ({} if keys is None else {"keys": keys})
    utils.linear_to_lora_layers(model, 1, parameters)
    model.update(tree_map(lambda x: mx.random.normal(x.shape) * 0.2, model.trainable_parameters()))
    folder = write_adapter(
        tmp_path / "adapter", fine_tune_type="lora", model=str(base), num_layers=1, lora_parameters=parameters
    )
    mx.save_safetensors(f"{folder}/adapters.safetensors", dict(tree_flatten(model.trainable_parameters())))
    ids = list(range(10, 30))
    expected = np.array(model(mx.array([ids]))[0])
    logits = load_pretrained(folder, None, 64).model.eval()(torch.tensor([ids])).logits[0].detach().numpy()
    assert abs(logits - expected).max() < 1e-5 * np.ptp(expected)
    without = (
        load_pretrained(str(base), None, 64).model.eval()(torch.tensor([ids])).logits[0].detach().numpy()
    )
    assert abs(without - expected).max() > 0.1 * np.ptp(expected)


def test_another_form_than_lora_is_refused(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", fine_tune_type="dora", model=str(base), num_layers=1)
    with pytest.raises(ValueError, match=r"should be LoRA, but it is dora: fuse it by mlx_lm\.fuse\."):
        load_pretrained(folder, None, 64)


def test_a_base_that_is_not_named_is_asked_for(tmp_path):
    folder = write_adapter(tmp_path / "adapter", fine_tune_type="lora", num_layers=1)
    with pytest.raises(ValueError, match="should name its base, but it names none: give --model"):
        load_pretrained(folder, None, 64)
