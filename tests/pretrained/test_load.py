"""Models by name: presets, JSON files, folders, the hub; dtypes, attention; what is wrong with a name."""

import json

import pytest
import torch

from dpo_wrapper.pretrained import load_pretrained, save_pretrained
from helpers.models import hf_llama

SMALL = {"dim": 32, "depth": 1, "heads": 2, "attn_dim_head": 16}
IDS = torch.arange(20)[None]


def write_json(path, content):
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def llama(tmp_path):
    """A folder with a Hugging Face model in bfloat16; its tokens are taken for bytes."""
    hf_llama(0, vocab_size=300).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.fixture
def unreachable(monkeypatch):
    """The hub cannot be reached; a list of what was asked of it."""
    import huggingface_hub

    asked = []

    def refuse(self, name, **options):
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    return asked


# names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smal", "but it is smal: did you mean small?"),
        ("Medium", "did you mean medium?"),
        ("/no/such/folder", "but it is /no/such/folder, and there is no such folder: check the name."),
        ("./runs", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_asked_of_the_hub(unreachable, name, message):
    with pytest.raises(ValueError) as caught:
        load_pretrained(name, None, 32)
    assert message in str(caught.value) and str(caught.value).startswith("--model should be tiny, small, ")
    assert not unreachable


def test_a_folder_with_a_close_name_is_named(unreachable, tmp_path, monkeypatch):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "weights.bin").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"it is runs/fist, and .* did you mean runs/first\?$"):
        load_pretrained("runs/fist", None, 32)
    assert unreachable == ["runs/fist"]  # which could be a model's name on the hub
    with pytest.raises(ValueError, match=r"but weights.bin is a file: give the folder"):
        load_pretrained("weights.bin", None, 32)


def test_a_hub_that_cannot_be_reached_is_asked_once(unreachable, monkeypatch, llama):
    import huggingface_hub

    message = r"there is no such folder, and the hub cannot be reached \(no route to host\): check"
    with pytest.raises(ValueError, match=message):
        load_pretrained("owner/model", None, 32)
    assert unreachable == ["owner/model"]
    with pytest.raises(ValueError, match=r"but 'a/b' is neither \(.*the hub cannot be reached"):
        load_pretrained("tiny", "a/b", 32)
    assert unreachable == ["owner/model", "a/b"]
    # an earlier download is used
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only: llama)
    assert load_pretrained("owner/model", "bytes", 32).num_embeddings == 300


def test_a_name_that_the_hub_does_not_know_is_told(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(self, name, **options):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(ValueError, match=r"no such folder, and no such model on the hub: check"):
        load_pretrained("owner/model", None, 32)


# JSON files


def test_a_decoder_by_the_arguments_of_its_constructors(tmp_path):
    layers = SMALL | {"alibi_pos_bias": True, "attn_kv_heads": 1}
    name = write_json(tmp_path / "decoder.json", {"use_abs_pos_emb": False, "attn_layers": layers})
    pretrained = load_pretrained(name, None, 48)
    assert pretrained.num_embeddings == pretrained.tokenizer.vocab_size == 263
    assert pretrained.model.max_seq_len == 48 and pretrained.model.attn_layers.dim == 32
    save_pretrained(pretrained, pretrained.model, tmp_path / "saved")
    again = load_pretrained(str(tmp_path / "saved"), None, 48)
    assert torch.equal(again.model.eval()(IDS), pretrained.model.eval()(IDS))
    name = write_json(tmp_path / "longer.json", {"num_tokens": 300, "max_seq_len": 7, "attn_layers": SMALL})
    pretrained = load_pretrained(name, None, 48)
    assert pretrained.num_embeddings == 300 and pretrained.max_positions == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"attn_layers": SMALL | {"rotary": True}}, "unrecognized kwargs passed in dict_keys(['rotary'])"),
        ({"attn_layers": SMALL, "dimm": 3}, "unexpected keyword argument 'dimm'"),
        ({"attn_layers": {"depth": 1}}, "missing 1 required positional argument: 'dim'"),
        ({"attn_layers": SMALL | {"causal": False}}, "cannot set causality on decoder"),
        ({"attn_layers": SMALL | {"attn_kv_heads": 3}}, "assert divisible_by(heads, kv_heads)"),
        ({"attn_layers": SMALL, "return_only_embed": True}, "return_only_embed leaves the output head out"),
        (
            {"attn_layers": SMALL, "num_tokens": 100},
            "should be at least 263, the vocabulary of the",
        ),
        ({"dim": 32}, "has no such dict: add it."),
        ([1], "has no such dict: add it."),
    ],
)
def test_arguments_that_x_transformers_refuses_are_told_with_its_reason(tmp_path, content, message):
    with pytest.raises(ValueError) as caught:
        load_pretrained(write_json(tmp_path / "decoder.json", content), None, 48)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "decoder.json" in str(caught.value) and str(caught.value).endswith(".")


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"but nothing.json cannot \(No such file or directory\): check"):
        load_pretrained("nothing.json", None, 48)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"should be valid JSON, but .*broken.json is not \(Expecting"):
        load_pretrained(str(tmp_path / "broken.json"), None, 48)


# dtypes


@pytest.mark.parametrize("kind", ["Hugging Face", "x-transformers"])
def test_the_dtype_that_is_asked_for_or_stored(llama, tmp_path, kind):
    name = llama if kind == "Hugging Face" else "tiny"
    narrow = load_pretrained(name, "bytes", 32, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.model.parameters()} == {torch.bfloat16}
    save_pretrained(narrow, narrow.model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_pretrained(str(tmp_path / "saved"), "bytes", 32, dtype=None)
    assert {p.dtype for p in stored.model.parameters()} == {torch.bfloat16}
    logits = [getattr(out, "logits", out) for out in (each.model.eval()(IDS) for each in (narrow, stored))]
    assert torch.equal(*logits) and logits[0].dtype == torch.bfloat16
    wide = load_pretrained(str(tmp_path / "saved"), "bytes", 32)
    assert {p.dtype for p in wide.model.parameters()} == {torch.float32}
    for one, other in zip(wide.model.parameters(), stored.model.parameters(), strict=True):
        assert torch.equal(one, other.float())


def test_rotary_positions_stay_exact_in_narrow_dtypes(tmp_path):
    """In bfloat16, whose integers end at 256, position 500 would be that of another token."""
    model = load_pretrained("tiny", None, 600).model.eval()
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    saved = load_pretrained("tiny", None, 600)
    save_pretrained(saved, model, tmp_path)
    narrow = load_pretrained(str(tmp_path), None, 600, dtype=torch.bfloat16).model.eval()
    ids = torch.arange(600)[None] % 256
    exact, rounded = model(ids), narrow(ids)
    relative = ((rounded - exact).abs().max() / exact.abs().max()).item()
    assert relative < 0.03
    narrow.attn_layers.rotary_pos_emb.bfloat16()
    assert (narrow(ids) - exact).abs().max() > 1.5 * relative * exact.abs().max()


# attention, quantised weights


def test_the_attention_that_is_asked_for(llama):
    logits = {}
    for name in ("eager", "sdpa"):
        model = load_pretrained(llama, "bytes", 32, attn_implementation=name).model
        assert model.config._attn_implementation == name
        logits[name] = model.eval()(IDS).logits
    assert torch.allclose(logits["eager"], logits["sdpa"], atol=1e-4)


def test_attention_that_cannot_be_is_refused(llama):
    with pytest.raises(ValueError, match=r"should be eager, .*sdpa, but it is sdp: did you mean sdpa\?$"):
        load_pretrained(llama, "bytes", 32, attn_implementation="sdp")
    with pytest.raises(ValueError, match=r"could not be loaded \(.*[Ff]lash.*\): check"):
        load_pretrained(llama, "bytes", 32, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"this one is of x-transformers: leave it out"):
        load_pretrained("tiny", None, 32, attn_implementation="sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there quantised weights can be computed")
def test_quantised_weights_are_told_where_nothing_computes_them(llama, tmp_path):
    config = tmp_path / "llama" / "config.json"
    content = json.loads(config.read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    config.write_text(json.dumps(content))
    message = (
        r"is quantised \(bitsandbytes\), for which a CUDA GPU .*would be needed: name the model as it was"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained(llama, "bytes", 32)


# files


def test_weights_can_be_read_by_whom_the_umask_lets(llama, tmp_path):
    import os

    before = os.umask(0o022)
    try:
        for name in (llama, "tiny"):
            pretrained = load_pretrained(name, "bytes", 32)
            save_pretrained(pretrained, pretrained.model, tmp_path / "out")
            modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
            assert modes and set(modes.values()) == {0o644}, modes
    finally:
        os.umask(before)


def test_the_configuration_of_a_hugging_face_model_gains_nothing(llama, tmp_path):
    pretrained = load_pretrained(llama, "bytes", 32, attn_implementation="eager")
    save_pretrained(pretrained, pretrained.model, tmp_path / "out")
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "llama", tmp_path / "out")
    )
    assert after == before | {"dtype": "float32"}
    assert not [
        file
        for file in (tmp_path / "out").glob("*.json")
        if str(tmp_path) in file.read_text(encoding="utf-8")
    ]
