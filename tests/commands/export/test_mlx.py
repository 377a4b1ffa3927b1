"""`--to mlx`: what is written, what is refused, and that a wrong export is found out without mlx-lm."""

import json
import os
import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_wrapper.commands.export import mlx as module
from dpo_wrapper.commands.export import mlx_base, mlx_reader
from dpo_wrapper.commands.export.agreement import ExportError
from dpo_wrapper.pretrained import load_pretrained
from helpers.exported_models import save_base, save_lora
from helpers.exports import export_to, read_record
from helpers.lora_runs import logits_of
from helpers.tokenizers import CHATML, save_tokenizer

pytest.importorskip("peft")

PATH = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("mlx") / "base")


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return save_lora(tmp_path_factory.mktemp("mlx") / "lora", base)


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def read_lora(folder):
    """PEFT's factors by path, as A and B."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def test_factors_are_transposed(lora, base, tmp_path):
    assert export_to(tmp_path, lora, "mlx") == 0
    written, given = load_file(tmp_path / "mlx" / "adapters.safetensors"), read_lora(lora)
    assert len(written) == len(given) == 28
    for letter in "AB":
        expected = given[f"{PATH}.lora_{letter}.weight"].T
        assert torch.equal(written[f"{PATH}.lora_{letter.lower()}"], expected)
    keys = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert read_config(tmp_path / "mlx") == {
        "fine_tune_type": "lora",
        "model": str(base),
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": keys},
    }


def test_ranks_and_scales_become_one(base, tmp_path):
    """Of rank 2 with alpha 10 the scale is 5, of rank 4 it is 2.5."""
    lora = save_lora(tmp_path / "lora", base, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"])
    assert export_to(tmp_path, lora, "mlx") == 0
    written, given = load_file(tmp_path / "mlx" / "adapters.safetensors"), read_lora(lora)
    a, b = written[f"{PATH}.lora_a"], written[f"{PATH}.lora_b"]
    assert torch.equal(a[:, :2], given[f"{PATH}.lora_A.weight"].T) and not a[:, 2:].any()
    assert torch.equal(b[:2], 5.0 * given[f"{PATH}.lora_B.weight"].T) and not b[2:].any()
    other = PATH.replace("q_proj", "v_proj")
    assert torch.equal(written[f"{other}.lora_b"], 2.5 * given[f"{other}.lora_B.weight"].T)
    parameters = read_config(tmp_path / "mlx")["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (4, 1.0)


def test_modules_of_some_layers_are_named_in_full(base, tmp_path):
    targets = ["q_proj", "layers.1.self_attn.v_proj", "embed_tokens", "lm_head"]
    assert export_to(tmp_path, save_lora(tmp_path / "lora", base, target_modules=targets), "mlx") == 0
    keys = read_config(tmp_path / "mlx")["lora_parameters"]["keys"]
    assert sorted(keys) == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.1.self_attn.v_proj",
        "self_attn.q_proj",
    ]


def test_the_base_is_linked_where_mlx_would_misread_it(lora, base, tmp_path, capsys):
    """transformers 5 names theta where mlx-lm does not look, and would be read as 10,000."""
    assert "rope_theta" not in json.loads((base / "config.json").read_text())
    assert export_to(tmp_path, lora, "mlx") == 0
    linked = tmp_path / "mlx" / "base"
    assert json.loads((linked / "config.json").read_text())["rope_theta"] == 50_000.0
    assert (linked / "model.safetensors").resolve() == (base / "model.safetensors").resolve()
    assert {"tokenizer.json", "chat_template.jinja"} <= set(os.listdir(linked))
    printed = capsys.readouterr().out
    assert f"mlx-lm would misread {base}, whose config.json" in printed
    words = ["mlx_lm.generate", "--model", linked, "--adapter-path", tmp_path / "mlx", "--prompt", "Hello"]
    assert shlex.join(map(str, words)) in printed


@pytest.fixture
def complete_base(base, tmp_path):
    """As older versions of transformers have written it."""
    folder = save_base(tmp_path / "complete")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 50_000.0}))
    return folder


def test_a_base_that_mlx_reads_right_is_named(complete_base, tmp_path, capsys):
    assert export_to(tmp_path / "out", save_lora(tmp_path / "lora", complete_base), "mlx") == 0
    assert not (tmp_path / "out" / "mlx" / "base").exists()
    assert f"mlx_lm.generate --model {complete_base} --adapter-path" in capsys.readouterr().out


def test_a_base_with_another_template_is_linked(complete_base, tmp_path):
    lora = save_lora(tmp_path / "lora", complete_base)
    save_tokenizer(lora, eos="<|im_end|>", puts_bos=False, template=CHATML.replace("assistant", "system"))
    assert export_to(tmp_path / "out", lora, "mlx") == 0
    template = (tmp_path / "out" / "mlx" / "base" / "chat_template.jinja").read_text()
    assert template == (lora / "chat_template.jinja").read_text()


def test_the_end_of_a_turn_is_named_where_the_base_lacks_it(tmp_path, capsys):
    base = save_base(tmp_path / "base")
    save_tokenizer(base, eos="</s>", puts_bos=False, template=CHATML)
    lora = save_lora(tmp_path / "lora", base)
    assert export_to(tmp_path / "out", lora, "mlx") == 0
    assert "--extra-eos-token '<|im_end|>' --prompt Hello" in capsys.readouterr().out
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    assert export_to(tmp_path / "out", lora, "mlx") == 0
    assert "--extra-eos-token" not in capsys.readouterr().out


def test_it_is_loaded_back(lora, base, tmp_path):
    assert export_to(tmp_path, lora, "mlx") == 0
    loaded = load_pretrained(str(tmp_path / "mlx"), None, 64)
    assert torch.allclose(
        logits_of(loaded.model), logits_of(load_pretrained(str(lora), None, 64).model), atol=1e-5
    )
    assert loaded.adapter.base == str(base) and loaded.adapter.folder == str(tmp_path / "mlx")
    assert any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert export_to(tmp_path / "again", tmp_path / "mlx", "peft", "mlx") == 0


def change_one(tensors, config):
    """By so little that no logit shows it."""
    tensors[f"{PATH}.lora_b"][1, 3] *= 1.00001


def transpose_both(tensors, config):
    for name in (f"{PATH}.lora_a", f"{PATH}.lora_b"):
        tensors[name] = tensors[name].T.contiguous()


def swap_halves(tensors, config):
    """As llama.cpp wants rows of q."""
    b = tensors[f"{PATH}.lora_b"]
    tensors[f"{PATH}.lora_b"] = b.reshape(4, 4, 2, 4).transpose(2, 3).reshape(4, 32).contiguous()


def drop_factors(tensors, config):
    del tensors[f"{PATH}.lora_a"], tensors[f"{PATH}.lora_b"]


def name_another(tensors, config):
    tensors["model.layers.2.self_attn.q_proj.lora_a"] = tensors.pop(f"{PATH}.lora_a")


def scale_by_alpha(tensors, config):
    config["lora_parameters"]["scale"] = 10.0


def count_fewer_layers(tensors, config):
    """So that mlx-lm adapts the last one alone."""
    config["num_layers"] = 1


def name_within_modules(tensors, config):
    keys = config["lora_parameters"]["keys"]
    keys[keys.index("self_attn.q_proj")] = "q_proj"


def leave_out_keys(tensors, config):
    config["lora_parameters"]["keys"].remove("self_attn.q_proj")


@pytest.mark.parametrize(
    "tamper",
    [
        count_fewer_layers,
        name_within_modules,
        change_one,
        transpose_both,
        swap_halves,
        drop_factors,
        name_another,
        scale_by_alpha,
        leave_out_keys,
    ],
)
def test_a_tampered_export_is_found_out(tamper, lora, tmp_path, monkeypatch):
    """Without mlx-lm, by PEFT."""
    write = module.write_mlx_adapter

    def write_and_tamper(factors, folder, *args):
        write(factors, folder, *args)
        tensors, config = load_file(folder / "adapters.safetensors"), read_config(folder)
        tamper(tensors, config)
        save_file(tensors, folder / "adapters.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))

    monkeypatch.setattr(module, "write_mlx_adapter", write_and_tamper)
    monkeypatch.setattr(mlx_reader, "has_mlx", lambda: False)
    assert export_to(tmp_path, lora, "mlx") == 1
    assert read_record(tmp_path / "mlx.differs")["status"] == "differs"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, r"but the adapter has magnitudes beside them \(DoRA\)"),
        ({"modules_to_save": ["lm_head"]}, r"but the adapter holds whole layers \(lm_head\)"),
        ({"trainable_token_indices": [5]}, "but the adapter holds embeddings of single tokens"),
        ({"bias": "all"}, r"but the adapter trains biases \(all\)"),
    ],
    ids=["dora", "whole-layers", "tokens", "biases"],
)
def test_more_than_factors_is_refused(options, reason, base, tmp_path):
    lora = save_lora(tmp_path / "lora", base, **options)
    with pytest.raises(ValueError, match=f"--to mlx takes factors of .*, {reason}: use --to merged"):
        export_to(tmp_path / "out", lora, "mlx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_weights_is_refused(target, tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    lora = save_lora(tmp_path / "lora", base, target_modules=[target])
    with pytest.raises(
        ValueError, match=rf"so that mlx-lm would change both \(.*{target}\): use --to merged"
    ):
        export_to(tmp_path / "out", lora, "mlx")


def test_positions_of_long_texts_are_refused(tmp_path):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 64,
        **factors,
    }
    base = save_base(tmp_path / "base", "phi3", rope_parameters=rope, original_max_position_embeddings=64)
    lora = save_lora(tmp_path / "lora", base)
    with pytest.raises(
        ValueError, match=r"a base that mlx-lm can compute, but .* its positions \(longrope\)"
    ):
        export_to(tmp_path / "out", lora, "mlx")
    assert export_to(tmp_path / "out", lora, "merged", dtype="float32") == 0


def test_modules_of_other_names_are_refused(tmp_path):
    base = save_base(tmp_path / "base", "gpt_neox")
    lora = save_lora(tmp_path / "lora", base, target_modules=["query_key_value"])
    with pytest.raises(ValueError, match=r"but one is gpt_neox\.layers\.0\.attention\.query_key_value: use"):
        export_to(tmp_path / "out", lora, "mlx")


def test_a_base_on_the_hub_is_read_from_its_cache(base, monkeypatch):
    import huggingface_hub

    def find_snapshot(name, **options):
        assert options["local_files_only"]
        return {"owner/name": str(base)}[name]

    monkeypatch.setattr(mlx_base, "find_model", lambda name: name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", find_snapshot)
    assert mlx_base.find_folder("owner/name") == mlx_base.find_folder(str(base)) == base


def test_it_says_what_to_install(lora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mlx_reader, "has_mlx", lambda: False)
    assert export_to(tmp_path, lora, "mlx", "merged", dtype="float32") == 0
    assert capsys.readouterr().out.count("mlx-lm has not read it, for it is missing: pip install mlx-lm") == 2


def test_mlx_finds_a_wrong_adapter_and_a_misread_base(lora, base, tmp_path):
    pytest.importorskip("mlx_lm")
    assert export_to(tmp_path, lora, "mlx") == 0
    folder, linked = tmp_path / "mlx", tmp_path / "mlx" / "base"
    ids = list(range(10, 40))
    expected = (
        load_pretrained(str(lora), None, 64).model.eval()(torch.tensor([ids])).logits[0].detach().numpy()
    )

    def compute_difference(model):
        return abs(mlx_reader.MlxReader(model, folder).compute_logits(ids) - expected).max() / np.ptp(
            expected
        )

    assert compute_difference(linked) < 1e-5
    assert compute_difference(base) > 0.05
    config = read_config(folder)
    config["lora_parameters"]["scale"] = 10.0
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert compute_difference(linked) > 0.05
    config["lora_parameters"]["keys"].remove("self_attn.q_proj")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="mlx-lm should load the export, but it does not"):
        mlx_reader.MlxReader(linked, folder)


def test_mlx_reads_prompts_as_in_training(lora, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlx_lm")
    link = module.link_base

    def link_another_tokenizer(source, base, folder):
        link(source, base, folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        return folder

    monkeypatch.setattr(module, "link_base", link_another_tokenizer)
    assert export_to(tmp_path, lora, "mlx") == 1
    assert "mlx-lm should read the prompt 'Hello' as the model's tokenizer does" in capsys.readouterr().out


def test_merged_models_that_mlx_does_not_know_are_named(tmp_path, capsys):
    pytest.importorskip("mlx_lm")
    assert export_to(tmp_path / "out", save_base(tmp_path / "base", "opt"), "merged") == 0
    assert "mlx-lm cannot read it: it does not know the architecture opt." in capsys.readouterr().out
