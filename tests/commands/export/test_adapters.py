"""Adapters of each family and form, as PEFT, mlx-lm and merged models have them: what is read back agrees."""

import pytest

from dpo_wrapper.commands.export.mlx_reader import has_mlx
from helpers.exported_models import FAMILIES, LINEAR, LLAMA3_ROPE, save_base, save_lora
from helpers.exports import export_to, read_record

pytest.importorskip("peft")

LORA = {
    "some ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
    "some scales": {"alpha_pattern": {"v_proj": 3, "layers.0.self_attn.o_proj": 17}},
    "rank-stabilized": {"use_rslora": True},
    "rank-stabilized, some ranks": {"use_rslora": True, "rank_pattern": {"k_proj": 3}},
    "one layer": {"layers_to_transform": [1], "target_modules": list(LINEAR)},
    "one module of a layer": {"target_modules": ["layers.0.self_attn.q_proj", "up_proj"]},
    "embeddings and head": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "embeddings alone": {"target_modules": ["embed_tokens"]},
}

ROPE = {
    "llama3": LLAMA3_ROPE,
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 2.0,
        "rope_theta": 50_000.0,
        "original_max_position_embeddings": 128,
    },
}


def check_agrees(model, out, *to):
    """Export, and see that each format was read by its own reader, and by mlx-lm where that is there."""
    assert export_to(out, model, *to, dtype="float32") == 0
    for name in to:
        record = read_record(out / name)
        readers = [one["reader"] for one in record["agreements"]]
        assert record["status"] == "verified" and readers
        assert ("mlx-lm" in readers) == (has_mlx() and name != "peft")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied_llama(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    lora = save_lora(tmp_path / "lora", save_base(tmp_path / "base", family))
    check_agrees(lora, tmp_path / "out", "peft", "mlx", "merged")


@pytest.mark.parametrize("form", LORA)
def test_forms_of_lora(form, llama, tmp_path):
    check_agrees(save_lora(tmp_path / "lora", llama, **LORA[form]), tmp_path / "out", "peft", "mlx", "merged")


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_positions(kind, tmp_path):
    lora = save_lora(tmp_path / "lora", save_base(tmp_path / "base", rope_parameters=ROPE[kind]))
    check_agrees(lora, tmp_path / "out", "mlx", "merged")


def test_tied_head(tied_llama, tmp_path):
    check_agrees(save_lora(tmp_path / "lora", tied_llama), tmp_path / "out", "peft", "mlx", "merged")
