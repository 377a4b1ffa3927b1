"""What a checkpoint holds: what changed. The rest is that of the model as it is loaded."""

import re

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper import DPO
from dpo_wrapper.training.checkpoint import STATE_FILE, FrozenWeights, load_checkpoint, write_checkpoint
from dpo_wrapper.training.processes import create_accelerator
from dpo_wrapper.training.state_files import read_state
from dpo_wrapper.training.stopping import TrainingError
from dpo_wrapper.training.train import train
from helpers.adapters import lora
from helpers.models import hf_llama, hf_llama_tied, xt_rotary
from helpers.runs import interrupt_training, make_config, read_metrics
from helpers.shareable_models import hf


class Session:
    """A process that trains a module, with what a checkpoint is made of."""

    def __init__(self, module, folder, rows):
        self.module, self.folder, self.frozen = module, folder, FrozenWeights(module)
        self.accelerator = create_accelerator(make_config(rows, folder))
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1)

    def change_trained_weights(self):
        for p in self.optimizer.param_groups[0]["params"]:
            p.data += 1

    def write(self):
        """Write a checkpoint; returns the names of its parameters."""
        self.folder.mkdir()
        write_checkpoint(self.folder, self.accelerator, self.frozen, self.optimizer, None)
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        return read_state(self.folder / STATE_FILE)["module"].keys() & parameters.keys()

    def load(self):
        load_checkpoint(self.folder, self.accelerator, self.frozen, self.optimizer, None)


def continued_adapter():
    """A policy with an adapter that has been trained: its reference is a copy, with that adapter."""
    model = lora(hf_llama(0))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(p, 0.25)
    return DPO(model)


def frozen_layers():
    model = xt_rotary(0)
    for p in model.attn_layers.parameters():
        p.requires_grad_(False)
    return DPO(model)


@pytest.mark.parametrize("build", [continued_adapter, frozen_layers, lambda: DPO(hf_llama(0))])
def test_frozen_weights_are_not_written_and_all_are_as_they_were(build, rows, tmp_path):
    before = Session(build(), tmp_path / "checkpoint", rows)
    trained = {name for name, p in before.module.named_parameters() if p.requires_grad}
    before.change_trained_weights()
    assert before.write() == trained
    after = Session(build(), tmp_path / "checkpoint", rows)
    after.load()
    expected, state = before.module.state_dict(), after.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    reference, policy = after.module.ref_model.state_dict(), after.module.policy_model.state_dict()
    assert any(not torch.equal(reference[name], policy[name]) for name in reference)


def test_a_reference_that_follows_the_policy_is_written_once_it_has_moved(rows, tmp_path):
    session = Session(frozen_layers(), tmp_path / "before", rows)
    session.change_trained_weights()
    assert not any(name.startswith("ref_model") for name in session.write())
    session.module.sync_reference(0.5)
    session.folder = tmp_path / "after"
    moved = {name for name in session.write() if name.startswith("ref_model")}
    trained = {name for name, p in session.module.policy_model.named_parameters() if p.requires_grad}
    assert moved == {f"ref_model.{name}" for name in trained}
    again = Session(frozen_layers(), tmp_path / "after", rows)
    again.load()
    state = again.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in session.module.state_dict().items())


def test_tied_weights_are_written_once(rows, tmp_path):
    session = Session(DPO(hf_llama_tied(0)), tmp_path / "checkpoint", rows)
    names = {f"policy_model.{name}" for name in ("lm_head.weight", "model.embed_tokens.weight")}
    assert names <= session.write()
    shape = session.module.policy_model.lm_head.weight.shape
    shapes = [t.shape for t in load_file(session.folder / STATE_FILE).values()]
    assert shapes.count(shape) == 1


def test_another_model_is_refused(rows, tmp_path):
    session = Session(frozen_layers(), tmp_path / "checkpoint", rows)
    session.write()
    other = frozen_layers()
    next(other.policy_model.attn_layers.parameters()).data[0] += 1
    with pytest.raises(TrainingError, match="as it was when the run began, since no checkpoint holds it"):
        Session(other, tmp_path / "checkpoint", rows).load()
    thawed = frozen_layers()
    thawed.policy_model.requires_grad_(True)
    with pytest.raises(TrainingError, match="should be as it was"):
        Session(thawed, tmp_path / "checkpoint", rows).load()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
        {"reference_dtype": "bfloat16"},
        {"reference_dtype": "bfloat16", "ref_model_sync_steps": 3},
        {"sft_epochs": 1},
        {"is_hugging_face": True},
        {"is_hugging_face": True, "ref_model_sync_steps": 2},
    ],
)
def test_runs_resume_to_the_same_result(options, rows, tmp_path, capsys):
    options = {"save_steps": 2, "sft_epochs": 0, "learning_rate": 1e-3} | options
    if options.pop("is_hugging_face", False):
        hf("Llama", vocab_size=300, max_position_embeddings=128)(0).save_pretrained(tmp_path / "base")
        options |= {"model": str(tmp_path / "base"), "tokenizer": "bytes"}
    train(make_config(rows, tmp_path / "whole", **options))
    with interrupt_training("dpo", after_steps=5):
        train(make_config(rows, tmp_path / "out", **options))
    train(make_config(rows, tmp_path / "out", resume=True, **options))
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    sizes = re.findall(r"checkpoint: (\S+) MB every 2 steps in (\S+)", capsys.readouterr().out)
    assert len(sizes) == (5 if options["sft_epochs"] else 3)  # once in each stage of a process
