"""Adapters of each family and form, as PEFT, mlx-lm and merged models have them: what is read back agrees."""

import json

import pytest

from dpo_wrapper.commands.export.mlx_reader import has_mlx
from dpo_wrapper.commands.export.run import EXPORT_FILE, run_export
from helpers.exported_models import (
    FAMILIES,
    LINEAR,
    LLAMA3_ROPE,
    make_export_config,
    save_base,
    save_lora,
)

pytest.importorskip("peft")

LORA = {
    "some ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
    "some scales": {"alpha_pattern": {"v_proj": 3, "layers.0.self_attn.o_proj": 17}},
    "rank-stabilized": {"use_rslora": True},
    "rank-stabilized, some ranks": {"use_rslora": True, "rank_pattern": {"k_proj": 3}},
    "one layer": {"layers_to_transform": [1]},
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
    assert run_export(make_export_config(model, out, *to)) == 0
    for name in to:
        record = json.loads((out / name / EXPORT_FILE).read_text())
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


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_merge_unties_the_head(options, tied_llama, tmp_path):
    """Embeddings or a head that have changed alone are two weights afterwards."""
    check_agrees(save_lora(tmp_path / "lora", tied_llama, **options), tmp_path / "out", "peft", "merged")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_more_than_factors(options, llama, tmp_path):
    """PEFT and merged models alone have them."""
    lora = save_lora(tmp_path / "lora", llama, **options)
    check_agrees(lora, tmp_path / "out", "peft", "merged")
    with pytest.raises(ValueError, match="--to mlx takes factors of linear layers and embeddings alone"):
        run_export(make_export_config(lora, tmp_path / "out", "mlx"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_in_16_bits(dtype, llama, tmp_path):
    config = make_export_config(save_lora(tmp_path / "lora", llama), tmp_path / "out", "merged", dtype=dtype)
    assert run_export(config) == 0
    settings = json.loads((tmp_path / "out/merged/config.json").read_text())
    assert settings["dtype"] == dtype and settings["rope_theta"] == 50_000.0
