"""What options of adapters are refused, and which layers they choose."""

import re
import sys

import pytest
import torch
import transformers

from dpo_wrapper.pretrained import save_pretrained
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.lora_targets import choose_layers, choose_targets, find_layers
from dpo_wrapper.training.options.lora import parse_layers
from dpo_wrapper.training.setup import set_up_training
from helpers.lora_runs import logits_of, make_lora_config, save_llama
from helpers.models import ZOO, hf_llama, hf_llama_tied, xt_rotary
from helpers.shareable_models import hf

peft = pytest.importorskip("peft")

PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"lora_r": 8}, "--lora-r is an option of a new adapter, but --lora is not given: add --lora"),
        ({"use_dora": True, "adapter": "a"}, "--use-dora is an option of a new adapter, but --adapter cont"),
        ({"lora": True, "adapter": "a"}, "--adapter should be left out if --lora is given"),
        ({"lora": True, "lora_r": 0}, "--lora-r should be at least 1, but it is 0"),
        ({"lora": True, "lora_alpha": 0.0}, "--lora-alpha should be a positive number"),
        ({"lora": True, "lora_dropout": 1.0}, "--lora-dropout should be in"),
        ({"lora": True, "lora_targets": ()}, "--lora-targets should be one name or more"),
        ({"lora": True, "lora_layers": "9-3"}, "--lora-layers should be like 20-29"),
        ({"lora": True, "lora_init": "eva"}, "but eva is computed from batches of data"),
        ({"lora": True, "lora_init": "loftq"}, "but loftq quantizes the base by itself"),
        ({"lora": True, "lora_init": "pizza"}, "but it is pizza: choose one."),
        ({"lora": True, "lora_init": "orthogonal", "lora_r": 3}, "--lora-r should be even"),
        ({"lora": True, "lora_init": "olora", "use_dora": True}, "--use-dora should be left out"),
        ({"lora": True, "lora_init": "pissa", "load_in_4bit": True}, "needs the base's weights in full"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        TrainConfig(data=tmp_path / "rows.jsonl", **({"model": "folder"} | options))


def test_what_does_not_fit_the_model_is_refused(rows, tmp_path, llama):
    def set_up(model=llama, **options):
        set_up_training(make_lora_config(rows, tmp_path / "out", model, **options))

    with pytest.raises(ValueError, match=r"but query matches none: it has embed_tokens|matches none: it has"):
        set_up(lora_targets=("query",))
    with pytest.raises(ValueError, match=r"none of the whole names, such as model\.layers\.0\."):
        set_up(lora_targets=("q_proj|v_proj",))
    with pytest.raises(ValueError, match=r"is the expression \.\*q_proj: write the numbers into it"):
        set_up(lora_targets=(".*q_proj",), lora_layers="1")
    with pytest.raises(ValueError, match="blocks of --lora-layers, but lm_head is in none of them"):
        set_up(lora_targets=("q_proj", "lm_head"), lora_layers="1")
    with pytest.raises(ValueError, match="but 2 is none of them: the model has blocks 0 to 1"):
        set_up(lora_layers="1-2")
    with pytest.raises(ValueError, match="holds no adapter_config"):
        set_up(adapter=llama)
    with pytest.raises(ValueError, match="should adapt a trained model, but --model tiny is a new one"):
        set_up("tiny")
    with pytest.raises(ValueError, match="should be given with an adapter"):
        set_up(lora=False, load_in_4bit=True)
    with pytest.raises(ValueError, match="should be given on a machine with a CUDA device, but --cpu is"):
        set_up(load_in_4bit=True)


def test_what_four_bits_need_is_named(rows, tmp_path, llama, monkeypatch):
    def set_up(**options):
        config = make_lora_config(rows, tmp_path / "out", llama, load_in_4bit=True, **options)
        set_up_training(config)

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="on a machine with a CUDA device, but there is none: leave it out"):
        set_up(cpu=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("dpo_wrapper.training.lora.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="bitsandbytes, which is missing: pip install bitsandbytes"):
        set_up(cpu=False)


def test_a_missing_peft_is_named(rows, tmp_path, llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft, but it is missing: pip install peft"):
        set_up_training(make_lora_config(rows, tmp_path / "out", llama))


def test_an_adapter_whose_base_is_gone_says_so(rows, tmp_path):
    base = save_decoder_adapter(tmp_path)
    with pytest.raises(ValueError, match=f"should be in {base}, but there is nothing: put it back, or"):
        set_up_training(make_lora_config(rows, tmp_path / "out", tmp_path / "adapter", lora=False))


def save_decoder_adapter(folder):
    """The configuration of an adapter whose base was moved away."""
    config = peft.LoraConfig(target_modules=["to_q"], base_model_name_or_path=str(folder / "base"))
    config.save_pretrained(folder / "adapter")
    return folder / "base"


@pytest.mark.parametrize(
    "make, targets",
    [
        (hf_llama, PROJECTIONS),
        (xt_rotary, ["ff.0.0", "ff.2", "to_k", "to_out", "to_q", "to_v"]),
        (hf("Qwen3", head_dim=8), PROJECTIONS),
        (hf("Mixtral", num_local_experts=3), ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (hf("Mamba", state_size=4), ["dt_proj", "in_proj", "x_proj"]),
        (
            hf("OPT", word_embed_proj_dim=8, ffn_dim=32),
            ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        ),
        (hf("GPTNeoX"), ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    ],
    ids=["llama", "decoder", "qwen3", "mixtral", "mamba", "opt", "gpt-neox"],
)
def test_by_default_the_linear_layers_of_blocks_are_adapted(make, targets):
    model = make(0)
    assert choose_targets(model, find_layers(model)) == targets
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets))
    names = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert names and not any("head" in name or "to_logits" in name or "embed" in name for name in names)


def test_the_layers_of_gpt2_are_stored_transposed(rows, tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_positions=256, n_embd=8, n_layer=1, n_head=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")

    def set_up(init):
        options = {"tokenizer": "bytes", "lora_init": init, "lora_r": 2}
        return set_up_training(make_lora_config(rows, tmp_path / "out", tmp_path / "base", **options))

    setup = set_up("pissa")
    lora = setup.pretrained.model.peft_config["default"]
    assert lora.fan_in_fan_out and set(lora.target_modules) == {"c_attn", "c_proj", "c_fc"}
    before = logits_of(setup.pretrained.model)
    with torch.no_grad():
        for parameter in setup.pretrained.model.parameters():
            parameter += 0.1 * parameter.requires_grad
    trained = logits_of(setup.pretrained.model)
    save_pretrained(setup.pretrained, setup.pretrained.model, tmp_path / "adapter")
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits_of(base), before, rtol=1e-5, atol=1e-5)
    loaded = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-5)
    assert (trained - before).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel are stored transposed, .* choose pissa"):
        set_up("olora")


def test_an_end_of_a_name_that_other_modules_have_is_written_out():
    model = hf_llama(0)
    model.model.add_module("q_proj", model.lm_head)
    targets = choose_targets(model, find_layers(model))
    assert "self_attn.q_proj" in targets and "q_proj" not in targets


def test_tied_weights_are_not_adapted():
    model = hf_llama_tied(0)
    for target in ("lm_head", "embed_tokens", ".*embed.*"):
        with pytest.raises(ValueError, match="with weights of their own, but"):
            choose_targets(model, find_layers(model), (target,))
    decoder = ZOO["xt-tied"](0)
    with pytest.raises(ValueError, match=r"but token_emb\.emb shares its weight"):
        choose_targets(decoder, find_layers(decoder), ("emb",))


def test_the_numbers_of_layers():
    assert parse_layers("20-22") == [20, 21, 22] and parse_layers(" 4, 0-1,1") == [0, 1, 4]
    assert parse_layers("") is None and parse_layers("1-") is None and parse_layers("-1") is None
    assert choose_layers(["model.layers.3.q_proj", "lm_head"], "3") == [3]
    with pytest.raises(ValueError, match="has no numbered blocks"):
        choose_layers(["lm_head"], "3")


def test_the_default_rate_of_an_adapter_falls_with_the_number_of_steps(tmp_path):
    config = TrainConfig(data=tmp_path / "rows.jsonl", model="folder", lora=True)
    rates = [config.peak_learning_rate("dpo", num_steps) for num_steps in (1, 6, 20, 80, 2000, 10**6)]
    assert rates == pytest.approx([5e-4, 5e-4, 5e-4, 2.5e-4, 5e-5, 5e-5])
    assert config.peak_learning_rate("sft", 80) == config.peak_learning_rate("pretrain", 80) == 2e-4
    given = TrainConfig(data=tmp_path / "rows.jsonl", model="folder", lora=True, learning_rate=1e-3)
    assert given.peak_learning_rate("dpo", 80) == 1e-3
