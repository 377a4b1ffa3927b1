"""Runs that train an adapter: what they save, what their reference is, and how they go on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import build_dpo, create_stage, run_training, train
from helpers.lora_runs import logits_of, make_lora_config, save_decoder, save_llama
from helpers.marks import mark_slow_except
from helpers.runs import assert_metrics_close, interrupt_training, read_metrics, run_in_two_processes

peft = pytest.importorskip("peft")

VARIANTS = {
    "default": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "orthogonal": {"lora_init": "orthogonal"},
    "mica": {"lora_init": "mica", "lora_r": 4},
    "PiSSA": {"lora_init": "pissa", "lora_r": 4},
    "PiSSA, fast": {"lora_init": "pissa_niter_4", "lora_r": 4, "use_rslora": True},
    "OLoRA": {"lora_init": "olora", "lora_r": 4},
    "an upper layer": {"lora_layers": "1"},
    "names": {"lora_targets": ("q_proj", "down_proj")},
    "an expression": {"lora_targets": (r".*\.1\..*(q|v)_proj",)},
    "dropout": {"lora_dropout": 0.1},
    "the head": {"lora_targets": ("q_proj", "lm_head")},
    "the embedding": {"lora_targets": ("q_proj", "embed_tokens")},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def decoder(tmp_path):
    return save_decoder(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:.*all logits")
@pytest.mark.parametrize("name", mark_slow_except({"default", "PiSSA"}, VARIANTS))
def test_plain_peft_loads_the_adapter_on_the_base_as_it_is(rows, tmp_path, llama, name):
    from transformers import AutoModelForCausalLM

    setup = set_up_training(make_lora_config(rows, tmp_path / "out", llama, **VARIANTS[name]))
    before = logits_of(setup.pretrained.model)
    run_training(setup)
    trained = logits_of(setup.pretrained.model)
    base = AutoModelForCausalLM.from_pretrained(llama)
    torch.testing.assert_close(before, logits_of(base), rtol=1e-4, atol=1e-4)
    assert (trained - before).abs().max() > 0.01
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits_of(theirs), trained, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(theirs.merge_and_unload()), trained, rtol=1e-3, atol=1e-3)
    ours = load_pretrained(str(tmp_path / "out"), None, 128)
    torch.testing.assert_close(logits_of(ours.model), trained, rtol=1e-4, atol=1e-4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "byte_tokenizer.json"} < names
    assert names.isdisjoint({"model.safetensors", "config.json", "checkpoints"})
    first = read_metrics(tmp_path / "out")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_an_adapter_of_a_decoder_loads_on_the_run_that_it_names(rows, tmp_path, decoder):
    setup = set_up_training(make_lora_config(rows, tmp_path / "out", decoder))
    run_training(setup)
    trained = logits_of(setup.pretrained.model)
    theirs = peft.PeftModel.from_pretrained(load_pretrained(str(decoder), None, 128).model, tmp_path / "out")
    assert torch.equal(logits_of(theirs), trained)
    ours = load_pretrained(str(tmp_path / "out"), None, 128)
    assert torch.equal(logits_of(ours.model), trained)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == ["ff.2", "proj", "to_k", "to_q", "to_v"]


def test_a_new_adapter_costs_no_second_model_and_an_older_one_only_its_own_weights(rows, tmp_path, llama):
    first = tmp_path / "first"
    setup = set_up_training(make_lora_config(rows, first, llama))
    dpo = build_dpo(setup, setup.stages[-1].splits, create_accelerator(setup.config))
    assert dpo.ref_model is None
    train(make_lora_config(rows, first, llama))

    setup = set_up_training(make_lora_config(rows, tmp_path / "second", first, lora=False))
    dpo = build_dpo(setup, setup.stages[-1].splits, create_accelerator(setup.config))
    policy, reference = dict(dpo.policy_model.named_parameters()), dict(dpo.ref_model.named_parameters())
    for name, parameter in policy.items():
        is_shared = parameter.data_ptr() == reference[name].data_ptr()
        assert is_shared == ("lora_" not in name) == (not parameter.requires_grad), name
    assert torch.equal(logits_of(dpo.policy_model), logits_of(dpo.ref_model))


def test_dropout_acts_on_the_policy_in_steps_alone(rows, tmp_path, llama):
    setup = set_up_training(make_lora_config(rows, tmp_path / "out", llama, lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in setup.pretrained.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    stage = create_stage(setup, setup.stages[-1], create_accelerator(setup.config))
    (batch,) = stage.normalize_over_step([stage.collate_fn(setup.stages[-1].splits.train[:3])], None)
    losses = {stage.micro_batch_loss(stage.module, batch)[0].item() for _ in range(3)}
    assert len(losses) == 3
    evaluated = [stage.evaluate(stage.module, [batch], None, lambda count: None) for _ in range(3)]
    assert evaluated[0]["loss"] == evaluated[1]["loss"] == evaluated[2]["loss"] not in losses
    assert evaluated[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("as_model", [True, False])
def test_an_adapter_is_continued_and_its_reference_is_the_adapter_as_it_was(
    rows, tmp_path, llama, capsys, as_model
):
    first, second = tmp_path / "first", tmp_path / "second"
    train(make_lora_config(rows, first, llama))
    options = {"lora": False} if as_model else {"adapter": first}
    train(make_lora_config(rows, second, first if as_model else "tiny", **options))
    sentence = f"reference: the base model ({llama}) with the adapter as it was loaded from {first}."
    merging = f"afterwards: to make one model, merge {second} into {llama}."
    assert f"{sentence}\n{merging}\n" in capsys.readouterr().out
    assert json.loads((second / "run.json").read_text())["reference"] == sentence
    log = read_metrics(second)
    assert log[0]["rewards/margins"] == 0 and log[0]["loss"] < read_metrics(first)[0]["loss"]
    shapes = [
        {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        for folder in (first, second)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("save_base", [save_llama, save_decoder])
def test_a_new_adapter_on_an_older_one_is_merged_after_it(rows, tmp_path, capsys, save_base):
    base_folder = save_base(tmp_path / "base")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    train(make_lora_config(rows, first, base_folder))
    train(make_lora_config(rows, second, first))
    setup = set_up_training(make_lora_config(rows, third, second))
    run_training(setup)
    out = capsys.readouterr().out
    merged = f"({base_folder}, {first} merged into it, {second} merged into it)"
    assert f"reference: the base model {merged} with the adapter switched off." in out
    order = f"merge {first} into {base_folder}, then {second} into the result, then {third} into the result."
    assert f"afterwards: to make one model, {order}" in out

    model = load_pretrained(str(base_folder), None, 128).model
    for folder in (first, second, third):
        model = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    trained = logits_of(setup.pretrained.model)
    torch.testing.assert_close(logits_of(model), trained, rtol=1e-3, atol=1e-3)
    ours = load_pretrained(str(third), None, 128)
    torch.testing.assert_close(logits_of(ours.model), trained, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module", params=["default", "PiSSA, fast", "DoRA", "dropout"])
def whole_run(request, rows, llama, tmp_path_factory):
    """The options of a run that has two stages, and its folder."""
    options = VARIANTS[request.param] | {"sft_epochs": 1, "save_steps": 2, "sft_learning_rate": 1e-2}
    folder = tmp_path_factory.mktemp("whole") / "out"
    train(make_lora_config(rows, folder, llama, **options))
    return options, folder


@pytest.mark.slow
@pytest.mark.parametrize("stage, after_steps", [("sft", 3), ("dpo", 0), ("dpo", 3)])
def test_an_interrupted_run_resumes_to_the_same_adapter(rows, tmp_path, llama, whole_run, stage, after_steps):
    options, whole = whole_run
    with interrupt_training(stage, after_steps=after_steps):
        train(make_lora_config(rows, tmp_path / "out", llama, **options))
    torch.manual_seed(999)  # whatever the state of the new process
    train(make_lora_config(rows, tmp_path / "out", llama, resume=True, **options))
    assert read_metrics(tmp_path / "out") == read_metrics(whole)
    for file in ("adapter_model.safetensors", "sft/adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
def test_supervised_training_alone_trains_an_adapter_too(rows, tmp_path, llama, capsys):
    out = tmp_path / "out"
    options = {"stage": ("sft",), "sft_epochs": 1, "sft_learning_rate": 1e-2, "epochs": 3}
    train(make_lora_config(rows, out, llama, learning_rate=None, **options))
    printed = capsys.readouterr().out
    assert (
        f"afterwards: to make one model, merge {out} into {llama}." in printed and "reference" not in printed
    )
    loaded = load_pretrained(str(out), None, 128).model
    assert (logits_of(loaded) - logits_of(loaded.unload())).abs().max() > 0.01


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(rows, tmp_path, llama):
    train(make_lora_config(rows, tmp_path / "one", llama))
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from dpo_wrapper.training.train import train\n"
        "from helpers.lora_runs import make_lora_config\n"
        "torch.set_num_threads(1)\n"
        "train(make_lora_config(*map(Path, sys.argv[1:])))\n"
    )
    run_in_two_processes(script, rows, tmp_path / "two", llama)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-3)
    assert_metrics_close(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"))
