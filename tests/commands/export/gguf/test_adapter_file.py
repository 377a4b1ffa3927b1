"""The GGUF file of an adapter: what stands in it, and what cannot."""

import json
import shutil
import sys

import numpy as np
import pytest

from helpers.exported_models import save_base, save_lora
from helpers.gguf_files import export_adapter, load_factors, read_gguf

pytest.importorskip("gguf")


def test_file_is_as_llama_cpp_reads_it(lora, exported):
    """Of the 8 rows of a head, llama.cpp has 0, 4, 1, 5, ... where transformers has 0, 1, 2, ..."""
    fields, tensors = read_gguf(exported / "adapter.gguf")
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 10.0
    assert fields["general.base_model.0.name"] == "base"
    factors = load_factors(lora)
    assert len(factors) == 14 and len(tensors) == 28
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    for path, name in (("self_attn.v_proj", "attn_v"), ("mlp.gate_proj", "ffn_gate")):
        one = factors[f"model.layers.1.{path}"]
        assert np.array_equal(tensors[f"blk.1.{name}.weight.lora_a"], one.a)
        assert np.array_equal(tensors[f"blk.1.{name}.weight.lora_b"], one.b)
    for letter, num_heads in (("q", 4), ("k", 2)):
        one = factors[f"model.layers.0.self_attn.{letter}_proj"]
        rows = [8 * head + k for head in range(num_heads) for k in (0, 4, 1, 5, 2, 6, 3, 7)]
        assert np.array_equal(tensors[f"blk.0.attn_{letter}.weight.lora_a"], one.a)
        assert np.array_equal(tensors[f"blk.0.attn_{letter}.weight.lora_b"], one.b[rows])


def test_scales_are_in_b(base, tmp_path):
    """Ranks 4 and 2 of alphas 10 and 3: alpha becomes 10, and a scale of 1.5 is 10 / 2 · 0.3."""
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    lora = save_lora(tmp_path / "lora", base, target_modules=["q_proj", "v_proj"], **options)
    assert export_adapter(lora, tmp_path) == 0
    fields, tensors = read_gguf(tmp_path / "gguf" / "adapter.gguf")
    factors = load_factors(lora)
    assert fields["adapter.lora.alpha"] == 10.0
    v, q = (factors[f"model.layers.0.self_attn.{letter}_proj"] for letter in "vq")
    assert np.array_equal(tensors["blk.0.attn_v.weight.lora_b"], v.b)
    written = np.sort(tensors["blk.0.attn_q.weight.lora_b"], axis=0)
    np.testing.assert_allclose(written, np.sort(0.3 * q.b, axis=0), rtol=1e-6)


def test_rank_stabilized_alpha(base, tmp_path):
    """The scale 10 / √4 = 5 is alpha / 4 of 20."""
    assert export_adapter(save_lora(tmp_path / "lora", base, use_rslora=True), tmp_path) == 0
    fields, _ = read_gguf(tmp_path / "gguf" / "adapter.gguf")
    assert fields["adapter.lora.alpha"] == 20.0


def test_embeddings_are_the_other_way_round(base, tmp_path):
    lora = save_lora(tmp_path / "lora", base, target_modules=["embed_tokens", "lm_head"])
    assert export_adapter(lora, tmp_path) == 0
    _, tensors = read_gguf(tmp_path / "gguf" / "adapter.gguf")
    factors = load_factors(lora)
    assert np.array_equal(tensors["token_embd.weight.lora_a"], factors["model.embed_tokens"].a.T)
    assert np.array_equal(tensors["token_embd.weight.lora_b"], factors["model.embed_tokens"].b)
    assert np.array_equal(tensors["output.weight.lora_a"], factors["lm_head"].a)
    assert np.array_equal(tensors["output.weight.lora_b"], factors["lm_head"].b)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"use_dora": True}, "has magnitudes beside them"),
        ({"bias": "lora_only"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "holds whole layers"),
        ({"alora_invocation_tokens": [1, 2]}, "computes otherwise"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "repeats layers of the base"),
    ],
)
def test_refuses_other_parts(options, reason, base, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export_adapter(save_lora(tmp_path / "lora", base, **options), tmp_path)
    assert not (tmp_path / "gguf").exists()


def test_refuses_a_base_that_the_beginning_has_changed(lora, tmp_path):
    shutil.copytree(lora, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match=r"what its beginning has left of the base \(pissa\)"):
        export_adapter(tmp_path / "lora", tmp_path)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_refuses_tied_embeddings(target, tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    lora = save_lora(tmp_path / "lora", base, target_modules=["q_proj", target])
    with pytest.raises(
        ValueError, match=f"changes .*{target}, and the base's embeddings are its output head"
    ):
        export_adapter(lora, tmp_path)


def test_names_a_library_that_is_missing(lora, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        export_adapter(lora, tmp_path)


def test_refuses_what_has_no_adapter(base, tmp_path):
    with pytest.raises(ValueError, match="needs a model with an adapter"):
        export_adapter(base, tmp_path)
