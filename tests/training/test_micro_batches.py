"""Micro-batches come from workers as they were made, however many there are."""

import pickle
import sys
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from dpo_wrapper.batches import TreeOptions
from dpo_wrapper.data.collate import COLLATE_FNS, collate_sft
from dpo_wrapper.tensor_dataclass import TensorDataclass
from dpo_wrapper.training.micro_batches import MicroBatches, make_micro_batches
from helpers.datasets import pairs
from helpers.forked_scripts import ForkedCommand
from helpers.runs import ROOT


def tensors_of(value):
    if isinstance(value, TensorDataclass):
        trees = vars(value).get("_trees", {}).values()
        for part in (*(getattr(value, field.name) for field in fields(value)), *trees):
            yield from tensors_of(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, Tensor):
        yield value


@pytest.mark.parametrize("collate", [COLLATE_FNS["preference"], COLLATE_FNS["ranked"], collate_sft])
def test_they_are_handed_over_as_they_are(collate):
    def collate_with_tree(examples):
        return collate(examples, tree_options=TreeOptions())

    batches = make_micro_batches(pairs(), collate_with_tree, 12, False, list(range(7)))
    copies = pickle.loads(pickle.dumps(batches))
    assert isinstance(copies, MicroBatches) and len(copies) == len(batches) > 2
    for batch, copied in zip(batches, copies, strict=True):
        assert vars(copied.sequences).keys() == vars(batch.sequences).keys()
        assert copied.sequences.content_hashes() == batch.sequences.content_hashes()
        tensors, copied_tensors = list(tensors_of(batch)), list(tensors_of(copied))
        assert len(tensors) == len(copied_tensors) > 10
        for tensor, other in zip(tensors, copied_tensors, strict=True):
            assert tensor.dtype == other.dtype and torch.equal(tensor, other)
            other.zero_()  # writable


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes")
def test_many_micro_batches_need_few_file_descriptors(rows, tmp_path):
    """22 of them a step; torch's own way needs a descriptor for each of their tensors, and waits for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from dpo_wrapper.pretrained import PRESETS\n"
        "from dpo_wrapper.training.train import train\n"
        "from helpers.runs import SMALL_DECODER, make_config\n"
        "torch.set_num_threads(1)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "PRESETS['tiny'] = SMALL_DECODER\n"
        "options = {'batch_size': 64, 'micro_batch_tokens': 1, 'num_workers': 2, 'save_steps': 0}\n"
        "train(make_config(*map(Path, sys.argv[1:]), **options))\n"
    )
    command = ForkedCommand(tmp_path / "printed", ROOT, script, rows, tmp_path / "out")
    assert command.status == 0, command.errors[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
