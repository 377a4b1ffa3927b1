"""The reference of each kind of run in words, and what is merged in which order."""

from pathlib import Path

import pytest

from dpo_wrapper import DPO
from dpo_wrapper.data.tokens.tokenizers import load_tokenizer
from dpo_wrapper.pretrained import AdapterOrigin, PretrainedModel
from dpo_wrapper.reference import CachedReference
from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.reference_words import describe_merging, describe_reference
from helpers.models import ZOO, hf_llama

NEW, LOADED = AdapterOrigin("org/base"), AdapterOrigin("org/base", folder="/runs/a")
STACKED = AdapterOrigin("org/base", merged=("/runs/a", "/runs/b"))


def words(made, adapter=None, stage_before=None, model="tiny", **options):
    config = TrainConfig(data=Path("rows.jsonl"), model=model, **options)
    pretrained = PretrainedModel(None, load_tokenizer("bytes"), "bytes", None, adapter)
    return describe_reference(made, pretrained, config, stage_before)


@pytest.fixture(scope="module")
def copied():
    return DPO(ZOO["xt-rotary"](0)).reference


@pytest.fixture(scope="module")
def switched_off():
    peft = pytest.importorskip("peft")
    return DPO(peft.get_peft_model(hf_llama(0), peft.LoraConfig(target_modules=["q_proj"]))).reference


def test_a_copy_is_named_by_where_the_model_comes_from(copied):
    assert words(copied) == "reference: a frozen copy of the new model."
    loaded = words(copied, model="org/base")
    assert loaded == "reference: a frozen copy of the model as it was loaded from org/base."
    after = "reference: a frozen copy of the model as it is after sft."
    assert words(copied, stage_before="sft") == words(copied, stage_before="sft", model="org/base") == after
    options = {"reference_dtype": "bfloat16", "reference_device": "cpu", "stage_before": "sft"}
    copy = "reference: a frozen copy in bfloat16 on cpu of the model as it is after sft."
    assert words(copied, **options) == copy
    moving = "of the new model; every 8 steps it moves 0.6 of the way to the policy."
    assert words(copied, ref_model_sync_steps=8) == f"reference: a frozen copy {moving}"


def test_an_adapter_is_named_by_its_base_and_by_when_it_was_copied(copied, switched_off):
    off = "reference: the base model (org/base) with the adapter switched off."
    assert words(switched_off, NEW) == off
    starts = "reference: the base model (org/base) with the adapter as it begins, which changes nothing."
    assert words(copied, NEW) == starts
    loaded = "reference: the base model (org/base) with the adapter as it was loaded from /runs/a."
    assert words(copied, LOADED) == loaded
    after = "reference: the base model (org/base) with the adapter as it is after sft."
    assert words(copied, NEW, "sft") == words(copied, LOADED, "sft") == after
    converted = words(copied, LOADED, reference_dtype="bfloat16")
    assert converted.startswith("reference: a frozen copy in bfloat16 of the base model (org/base) with")
    merged = "the base model (org/base, /runs/a merged into it, /runs/b merged into it)"
    assert words(switched_off, STACKED) == f"reference: {merged} with the adapter switched off."


def test_no_reference_and_computed_log_probs(switched_off):
    none, cached = DPO(ZOO["xt-rotary"](0), reference="none").reference, CachedReference(per_token=False)
    assert words(none, reference="none") == "reference: none, as --reference asks."
    assert words(none, loss="simpo") == "reference: none, for --loss simpo needs none."
    computed = "its log-probs are computed before training, and no copy is kept."
    assert words(cached, NEW, "sft").endswith(f"with the adapter as it is after sft; {computed}")


def test_adapters_are_merged_in_the_order_in_which_they_were_trained():
    out = Path("/runs/c")
    assert describe_merging(NEW, out) == "afterwards: to make one model, merge /runs/c into org/base."
    order = "merge /runs/a into org/base, then /runs/b into the result, then /runs/c into the result."
    assert describe_merging(STACKED, out) == f"afterwards: to make one model, {order}"
