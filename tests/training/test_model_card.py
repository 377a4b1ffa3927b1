"""The model card in the run folder."""

from pathlib import Path

import pytest

from dpo_wrapper.training.model_card import describe_loss, format_metadata
from helpers.datasets import write_rows
from helpers.runs import make_config


def test_a_run_has_a_card(finished_run):
    card = (finished_run / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: x-transformers\npipeline_tag: text-generation\ntags:\n")
    assert (
        f"# {finished_run.name}\n" in card and "A new decoder of size tiny, trained with dpo-wrapper" in card
    )
    assert "| sft | 22 completions |" in card and "| dpo | 22 pairs |" in card
    assert "Loss: `sigmoid(beta=0.1) + 1.0*sft`; reference: the model as it was before" in card
    assert "reward accuracy" in card and 'load_pretrained("out", None, 128)' in card
    assert str(finished_run.parent) not in card, "a path of this machine"


def test_the_hub_is_told_names_that_it_knows(tmp_path):
    local = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    data, model = (local, Path("trl-lib/ultrafeedback")), "HuggingFaceTB/SmolLM2-135M"
    config = make_config(data, tmp_path / "out", model=model)
    metadata = format_metadata(config, is_decoder=False, has_preferences=True)
    assert metadata.splitlines() == [
        "---", "library_name: transformers", 'base_model: "HuggingFaceTB/SmolLM2-135M"',
        "pipeline_tag: text-generation", "datasets:", '- "trl-lib/ultrafeedback"', "tags:", "- dpo-wrapper",
        "- dpo", "---",
    ]  # fmt: skip
    config = make_config(local, tmp_path / "out", model=str(tmp_path))
    metadata = format_metadata(config, is_decoder=False, has_preferences=False)
    assert "base_model" not in metadata and "datasets" not in metadata and "- dpo\n" not in metadata


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"loss": "simpo"}, "reference: none."),
        ({"loss": "sigmoid", "reference": "none"}, "reference: none."),
        ({"loss": "sigmoid"}, "reference: the model as it was before preference training."),
        (
            {"loss": "sigmoid", "ref_model_sync_steps": 64},
            "before preference training, moved towards the policy every 64 steps.",
        ),
    ],
)
def test_the_reference_stands_in_words(options, expected):
    assert describe_loss(make_config("rows", "out", **options)).endswith(expected)
