"""What sharding needs that one process can show: options, layers, batches that count nothing, checksums."""

import pytest
import torch
from torch import nn

from dpo_wrapper import DPO
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.collate import COLLATE_FNS
from dpo_wrapper.losses import parse_losses
from dpo_wrapper.models import language_model
from dpo_wrapper.reference.shared_weights import compute_checksums
from dpo_wrapper.training import sharding
from dpo_wrapper.training.checkpoint import as_integers
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.sharded_state import read_shards, take_sharded
from dpo_wrapper.training.sharding import leave_unscored, unshare_weights
from dpo_wrapper.training.state_files import ShardedEntry, read_state, write_state
from dpo_wrapper.training.stopping import TrainingError
from helpers.models import hf_llama, xt_rotary
from helpers.runs import make_config

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({}, {"fsdp": True}, "over several processes, but there is one: start them by torchrun"),
        (FSDP, {}, "over several processes, but there is one"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "shard by FSDP2, but it asks for DeepSpeed"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            {},
            "its dynamo_backend is inductor: leave it out",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "--precision should be bf16, .*, but it is no: give"),
    ],
)
def test_what_accelerate_cannot_ask_for_is_refused(variables, options, message, rows, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        set_up_training(make_config(rows, tmp_path / "out", **options))


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "its fsdp_version is 1: write fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading is true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "write false, and give --gradient-checkpointing"),
        ({}, {"reference_device": "cpu"}, "--reference-device should be left out"),
        ({}, {"load_in_4bit": True, "lora": True, "model": "x"}, "--load-in-4bit should be left out"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(variables, options, message, rows, tmp_path, monkeypatch):
    class TwoProcesses:
        num_processes = 2

    monkeypatch.setattr(sharding, "join_processes", lambda _: TwoProcesses)
    for name, value in (FSDP | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        sharding.find_fsdp_plugin(make_config(rows, tmp_path / "out", **options))


def test_accelerate_that_knows_no_fsdp2_is_named(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "FullyShardedDataParallelPlugin", object)
    with pytest.raises(ImportError, match=r"accelerate 1\.6 or newer: pip install -U accelerate"):
        sharding.find_fsdp_plugin(make_config(rows, tmp_path / "out", fsdp=True))


def test_a_single_number_cannot_be_sharded(rows, tmp_path):
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(TrainingError, match="but scale is a single number: train without --fsdp"):
        sharding.shard_module(model, model, None, None)


def test_layers_are_those_that_are_called_by_themselves():
    decoder, llama = xt_rotary(0), hf_llama(0)
    names = [type(layer).__name__ for layer in language_model(decoder).layers_to_shard()]
    assert names == ["Attention", "FeedForward"] * (len(names) // 2) and names
    assert language_model(llama).layers_to_shard() == list(llama.model.layers)
    assert language_model(nn.Linear(2, 2)).layers_to_shard() == []
    assert sharding.find_layers(llama, ["LlamaMLP"]) == [layer.mlp for layer in llama.model.layers]
    with pytest.raises(TrainingError, match="but MLP is none: correct it, or leave it out"):
        sharding.find_layers(llama, ["LlamaMLP", "MLP"])


PAIR = TokenizedExample((1, 2, 3), ((4, 5), (6,)))
EXAMPLES = {
    "sigmoid": PAIR,
    "plackettluce": TokenizedExample((1, 2, 3), ((4, 5), (6,), (7, 8)), ranks=(1, 2, 3)),
    "kto": TokenizedExample((1, 2, 3), ((4, 5),), label=True, kl_completion=(7, 8)),
}


@pytest.mark.parametrize("loss", EXAMPLES)
def test_a_batch_that_is_added_counts_nowhere_and_trains_nothing(loss):
    model = hf_llama(0)
    dpo = DPO(model, loss=parse_losses(loss))
    collate = COLLATE_FNS[dpo.loss.dataset_type]
    added, whole = (collate([one]) for one in (leave_unscored(EXAMPLES[loss]), EXAMPLES[loss]))
    alone, beside = dpo.normalize_over_step([whole])[0], dpo.normalize_over_step([added, whole])
    assert torch.equal(dpo(alone), dpo(beside[1])) and dpo(alone) != 0
    loss, metrics = dpo(beside[0], return_metrics=True)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert {name for name, sums in metrics.items() if sums.any()} <= {"tokens/padded", "tokens/unique"}


def test_a_reference_that_shares_frozen_weights_gets_its_own():
    model = hf_llama(0)
    model.model.embed_tokens.weight.requires_grad_(False)
    dpo = DPO(model)
    shared = dpo.ref_model.model.embed_tokens
    assert shared.weight is model.model.embed_tokens.weight
    unshare_weights(dpo.ref_model, model)
    assert shared.weight is not model.model.embed_tokens.weight and not shared.weight.requires_grad
    assert torch.equal(shared.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(5,), (7, 3), (4, 2, 4)])
def test_checksums_of_shards_add_up_to_that_of_the_whole(dtype, shape):
    tensor = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    (whole,) = compute_checksums([as_integers(tensor)])
    parts = compute_checksums([as_integers(part.contiguous()) for part in tensor.chunk(3)])
    assert (sum(parts) - whole) % 2**64 == 0
    tensor.view(-1)[1] += 1
    assert compute_checksums([as_integers(tensor)]) != [whole]


def test_sharded_entries_stand_in_the_file_of_a_state(tmp_path):
    state = {"a": [ShardedEntry("module.a", (2, 3), torch.bfloat16)], "b": torch.ones(2)}
    write_state(tmp_path / "state", state)
    assert read_state(tmp_path / "state")["a"] == state["a"]
    assert take_sharded(state)[1] == {}


def test_shards_that_are_gone_are_said_in_one_sentence(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(TrainingError, match=r"should be part of a checkpoint, but it cannot be read .*"):
            read_shards(folder, {"module.a": torch.empty(2)})
