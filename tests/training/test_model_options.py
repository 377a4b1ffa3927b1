"""Options of the model that is trained: dtype, freezing, checkpointing, compiling, shared prefixes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.training.policy import resolve_dtype, set_up_policy
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.stopping import TrainingError
from dpo_wrapper.training.train import create_stage, run_training, train
from helpers.models import hf_gpt2, hf_llama, hf_opt
from helpers.runs import assert_metrics_close, interrupt_training, make_config, read_metrics
from helpers.shareable_models import hf

SMALL = {"max_length": 64, "batch_size": 8, "save_steps": 0, "sft_epochs": 0, "epochs": 1}


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    hf_llama(0, vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    return {"model": str(folder), "tokenizer": "bytes"}


@pytest.fixture(scope="session")
def bloom(tmp_path_factory):
    """A model that counts positions by itself."""
    folder = tmp_path_factory.mktemp("models") / "bloom"
    hf("Bloom", n_head=2, n_layer=2, vocab_size=300)(0).save_pretrained(folder)
    return {"model": str(folder), "tokenizer": "bytes"}


def set_up(rows, tmp_path, **options):
    return set_up_training(make_config(rows, tmp_path / "out", **(SMALL | options)))


# dtype


@pytest.mark.parametrize(
    ("dtype", "lora", "is_cpu", "expected"),
    [
        ("auto", False, False, torch.float32),
        ("auto", True, True, torch.float32),
        ("auto", True, False, None),
        ("bfloat16", False, True, torch.bfloat16),
        ("float16", True, False, torch.float16),
        ("float32", True, False, torch.float32),
    ],
)
def test_the_dtype_of_weights(rows, tmp_path, monkeypatch, dtype, lora, is_cpu, expected):
    from dpo_wrapper.training import policy

    state = SimpleNamespace(device=torch.device("cpu" if is_cpu else "cuda"))
    monkeypatch.setattr(policy, "join_processes", lambda config: state)
    assert resolve_dtype(make_config(rows, tmp_path, dtype=dtype, lora=lora)) == expected


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_narrow_weights_that_train_are_told(rows, tmp_path, llama, model):
    options = llama if model == "llama" else {"model": model}
    setup = set_up(rows, tmp_path, dtype="bfloat16", **options)
    assert {p.dtype for p in setup.pretrained.model.parameters()} == {torch.bfloat16}
    assert any(note.startswith("weights train in bfloat16: updates below") for note in setup.notes)
    assert not any("bfloat16" in note for note in set_up(rows, tmp_path, **options).notes)
    with pytest.raises(ValueError, match=r"^--dtype float16 should be for weights that do not train"):
        set_up(rows, tmp_path, dtype="float16", **options)


def test_an_adapter_trains_in_float32_on_a_narrow_base(rows, tmp_path, llama):
    setup = set_up(rows, tmp_path, dtype="bfloat16", lora=True, **llama)
    parameters = list(setup.pretrained.model.parameters())
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in parameters if not p.requires_grad} == {torch.bfloat16}
    assert not any("bfloat16" in note for note in setup.notes)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_a_run_in_bfloat16_is_saved_in_bfloat16(rows, tmp_path, llama, model):
    options = llama if model == "llama" else {"model": model}
    config = make_config(rows, tmp_path / "out", **(SMALL | options), dtype="bfloat16", learning_rate=1e-2)
    setup = set_up_training(config)
    run_training(setup)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_pretrained(str(tmp_path / "out"), "bytes", 64, dtype=None)
    ids = torch.arange(20)[None]
    logits = [getattr(out, "logits", out) for out in (m.model.eval()(ids) for m in (setup.pretrained, again))]
    assert torch.equal(*logits) and logits[0].dtype == torch.bfloat16


def test_quantised_weights_do_not_train_without_an_adapter(rows, tmp_path):
    model = hf_llama(0)
    model.is_quantized = True  # as transformers marks them
    with pytest.raises(ValueError, match=r"but those of LlamaForCausalLM are quantised: add --lora, or name"):
        set_up_policy(model, make_config(rows, tmp_path))
    assert set_up_policy(model, make_config(rows, tmp_path, model="llama", lora=True)) == []


# freezing


def test_parameters_are_frozen_by_patterns(rows, tmp_path, llama):
    setup = set_up(rows, tmp_path, freeze=("embed", r"layers\.0\."), **llama)
    trained = {name for name, p in setup.pretrained.model.named_parameters() if p.requires_grad}
    names = dict(setup.pretrained.model.named_parameters())
    assert trained == {name for name in names if "embed" not in name and "layers.0." not in name}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("embed_token$",), r"but embed_token\$ matches none: close are embed_tokens"),
        (
            ("xyz",),
            r"but xyz matches none: names are such as model.embed_tokens.weight and lm_head",
        ),
        (("model", "head"), r"but model head matches all of them: leave a pattern out\.$"),
        (("[",), r"should be regular expressions, but \[ is none \(unterminated character set"),
    ],
)
def test_patterns_that_cannot_be_are_told(rows, tmp_path, llama, patterns, message):
    with pytest.raises(ValueError, match=message):
        set_up(rows, tmp_path, freeze=patterns, **llama)


def test_what_an_adapter_has_frozen_is_told(rows, tmp_path, llama):
    with pytest.raises(ValueError, match=r"but embed matches none of the adapter, and its base is frozen"):
        set_up(rows, tmp_path, lora=True, freeze="embed", **llama)
    model = set_up(rows, tmp_path, lora=True, freeze="lora_A", **llama).pretrained.model
    assert all("lora_B" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_an_adapter_trains_on_a_base_in_bfloat16(rows, tmp_path, llama, model):
    options = {"lora": True, "dtype": "bfloat16", "learning_rate": 1e-2}
    options |= (llama | {"gradient_checkpointing": True}) if model == "llama" else {"sft_epochs": 0}
    if model == "tiny":
        train(make_config(rows, tmp_path / "base", **(SMALL | {"sft_epochs": 1})))
        options |= {"model": str(tmp_path / "base")}
    setup = set_up_training(make_config(rows, tmp_path / "out", **(SMALL | options)))
    dtypes = {(p.requires_grad, p.dtype) for p in setup.pretrained.model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert not any("bfloat16" in note for note in setup.notes)
    run_training(setup)
    records = [record for record in read_metrics(tmp_path / "out") if record["part"] == "train"]
    assert records[1]["loss"] < records[0]["loss"] - 0.1 and records[0]["rewards/margins"] == 0.0


def test_a_tied_head_is_found_by_its_name(rows, tmp_path):
    hf_llama(0, vocab_size=300, tie_word_embeddings=True, max_position_embeddings=128).save_pretrained(
        tmp_path / "tied"
    )
    setup = set_up(rows, tmp_path, model=str(tmp_path / "tied"), tokenizer="bytes", freeze="lm_head")
    assert not setup.pretrained.model.get_input_embeddings().weight.requires_grad


# checkpointing


@pytest.mark.slow
def test_checkpointed_layers_run_again_to_the_same_result(rows, tmp_path, llama):
    runs, logs = {}, {}
    for is_on in (False, True):
        out = tmp_path / str(is_on)
        options = SMALL | llama | {"sft_epochs": 1, "gradient_checkpointing": is_on}
        setup = set_up_training(make_config(rows, out, **options))
        calls = []
        setup.pretrained.model.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda *_, calls=calls: calls.append(torch._C._current_graph_task_id())
        )
        run_training(setup)
        runs[is_on], logs[is_on] = sum(task != -1 for task in calls), read_metrics(out)
    steps = sum(record["part"] == "step" for record in logs[True])
    assert runs[False] == 0 and runs[True] >= steps  # in backward
    assert_metrics_close(logs[False], logs[True])


@pytest.mark.filterwarnings("error::FutureWarning")
def test_checkpointing_is_turned_on_by_its_present_name(rows, tmp_path, llama):
    setup = set_up(rows, tmp_path, **llama | {"gradient_checkpointing": True})
    assert setup.pretrained.model.model.layers[0].gradient_checkpointing


def test_models_without_checkpointing_are_told(rows, tmp_path):
    message = r"but TransformerWrapper of x-transformers has no such option: lower --micro-batch-tokens"
    with pytest.raises(ValueError, match=message):
        set_up(rows, tmp_path, gradient_checkpointing=True)


# compiling


@pytest.mark.slow
def test_compiled_layers_train_alike(rows, tmp_path, llama, capsys):
    logs = {}
    for is_on in (False, True):
        out = tmp_path / str(is_on)
        options = SMALL | llama | {"torch_compile": is_on}
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            train(make_config(rows, out, **options))
        logs[is_on] = read_metrics(out)
        printed = capsys.readouterr().out
        assert ("compiled: 7 feed-forward layers and norms" in printed) == is_on
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_metrics_close(logs[False], logs[True])
    one, other = (load_file(tmp_path / str(is_on) / "model.safetensors") for is_on in (False, True))
    assert one.keys() == other.keys()
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_missing_compiler_is_told_before_training(rows, tmp_path, monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        pytest.raises(ValueError, match=r"needs a compiler .* finds none \(InvalidCxxCompiler: No working"),
    ):
        set_up(rows, tmp_path, torch_compile=True)
    assert not (tmp_path / "out").exists()
    torch._dynamo.reset()


def test_models_without_layers_to_compile_are_told(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    folder = tmp_path / "opt"
    hf_opt(0).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"but OPTForCausalLM has none: leave it out\.$"):
        set_up(rows, tmp_path, model=str(folder), tokenizer="bytes", torch_compile=True)


@pytest.mark.parametrize("family", ["tiny", "gpt2"])
def test_layers_to_compile_are_found_by_their_classes(rows, tmp_path, monkeypatch, family):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: compiled.append(self))
    options = {"model": family}
    if family == "gpt2":
        model = hf_gpt2(0)
        model.resize_token_embeddings(300)
        model.save_pretrained(tmp_path / "gpt2")
        options = {"model": str(tmp_path / "gpt2"), "tokenizer": "bytes", "max_length": 24}
    setup = set_up(rows, tmp_path, torch_compile=True, **options)
    expected = {"FeedForward", "RMSNorm"} if family == "tiny" else {"GPT2MLP"}  # whose norms are torch's own
    assert {type(m).__name__ for m in compiled} == expected
    assert f"compiled: {len(compiled)} feed-forward layers and norms" in setup.notes


# shared prefixes


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_whether_prefixes_are_shared_is_an_option(rows, tmp_path, llama, stage):
    words = {"auto": "shared prefixes are computed once", "never": "sequences are padded"}
    words["always"] = words["auto"]
    for share_prefix, expected in words.items():
        options = llama | {"stage": (stage,), "sft_epochs": None, "epochs": 3}
        setup = set_up(rows, tmp_path, share_prefix=share_prefix, **options)
        made = create_stage(setup, setup.stages[0], create_accelerator(setup.config))
        made.scorer.check(made.collate_fn(setup.stages[0].splits.train[:1]).sequences)
        assert expected in made.scorer.explain()
        assert made.scorer.share_prefix == setup.config.prefix_sharing


def test_a_model_that_cannot_share_prefixes_says_why(rows, tmp_path, bloom):
    with pytest.raises(ValueError) as caught:
        set_up(rows, tmp_path, share_prefix="always", **bloom)
    assert str(caught.value) == (
        "prefixes are not shared in the Hugging Face model, for its tokens meet elsewhere than in "
        "transformers' attention interface: use --share-prefix auto."
    )
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_probe_refuses_stops_with_a_sentence(rows, tmp_path, llama, monkeypatch):
    from transformers import LlamaForCausalLM

    setup = set_up(rows, tmp_path, **llama)
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, *a, **k: forward(self, *a, **k).logits[:1])
    with pytest.raises(TrainingError, match=r"the model should return"):
        run_training(setup)


# all together


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_a_run_with_these_options_resumes_to_the_same_result(rows, tmp_path, llama, model):
    options: dict = {"dtype": "bfloat16", "freeze": ("token_emb",), "share_prefix": "never"}
    if model == "llama":
        checkpointing = {"gradient_checkpointing": True, "attn_implementation": "eager"}
        options |= llama | checkpointing | {"freeze": ("embed_tokens", r"layers\.0\.self_attn")}
    options |= SMALL | {"sft_epochs": 1, "learning_rate": 1e-3}
    train(make_config(rows, tmp_path / "whole", **options))
    config = make_config(rows, tmp_path / "out", **(options | {"save_steps": 1}))
    with interrupt_training("dpo", after_steps=2):
        train(config)
    train(replace(config, resume=True))
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]
    after = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "out" / "sft" / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and not any("embed_tokens" in name or "token_emb" in name for name in changed)
