"""The model card in the run folder."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from dpo_wrapper.pretrained import AdapterOrigin, PretrainedModel
from dpo_wrapper.training.model_card import format_metadata
from dpo_wrapper.training.run_summary import hide_paths
from helpers.datasets import write_rows
from helpers.runs import make_config


def test_a_run_has_a_card(finished_run):
    card = (finished_run / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: x-transformers\npipeline_tag: text-generation\ntags:\n")
    assert f"# {finished_run.name}\n" in card
    assert "A new decoder (tiny), trained with dpo-wrapper" in card
    assert "| sft | 21 completions |" in card and "| dpo | 21 pairs |" in card
    assert "Loss: `sigmoid(beta=0.1) + 1.0*sft`; reference: a frozen copy of the model as" in card
    assert "reward accuracy" in card and 'load_pretrained("out", None, 128)' in card
    assert str(finished_run.parent) not in card, "a path of this machine"


def test_the_hub_reads_the_metadata(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    config = make_config((Path("trl-lib/ultrafeedback"),), tmp_path / "out", model="a/b")
    adapter = AdapterOrigin(base="a/b")
    pretrained = PretrainedModel(nn.Module(), None, "bytes", None, adapter)
    data = hub.ModelCard(format_metadata(config, pretrained, has_preferences=True)).data
    assert data.to_dict() == {
        "library_name": "peft",
        "base_model": "a/b",
        "pipeline_tag": "text-generation",
        "datasets": ["trl-lib/ultrafeedback"],
        "tags": ["dpo-wrapper", "dpo", "lora"],
    }


def test_the_hub_is_told_names_that_it_knows(tmp_path):
    local = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    data, model = (local, Path("trl-lib/ultrafeedback")), "HuggingFaceTB/SmolLM2-135M"
    config = make_config(data, tmp_path / "out", model=model)
    pretrained = PretrainedModel(nn.Module(), None, "bytes", None)
    metadata = format_metadata(config, pretrained, has_preferences=True)
    assert metadata.splitlines() == [
        "---", "library_name: transformers", 'base_model: "HuggingFaceTB/SmolLM2-135M"',
        "pipeline_tag: text-generation", "datasets:", '- "trl-lib/ultrafeedback"', "tags:", "- dpo-wrapper",
        "- dpo", "---",
    ]  # fmt: skip
    config = make_config(local, tmp_path / "out", model=str(tmp_path))
    metadata = format_metadata(config, pretrained, has_preferences=False)
    assert "base_model" not in metadata and "datasets" not in metadata and "- dpo\n" not in metadata
    adapter = AdapterOrigin(base="HuggingFaceTB/SmolLM2-135M")
    metadata = format_metadata(config, replace(pretrained, adapter=adapter), has_preferences=True)
    assert "library_name: peft" in metadata and 'base_model: "HuggingFaceTB/SmolLM2-135M"' in metadata
    assert metadata.endswith("- lora\n---")


def test_paths_of_the_machine_are_left_out(tmp_path):
    (tmp_path / "base").mkdir()
    sentence = f"reference: the base model ({tmp_path}/base) with org/name loaded from {tmp_path}/base."
    expected = "reference: the base model (base) with org/name loaded from base."
    assert hide_paths(sentence) == expected
