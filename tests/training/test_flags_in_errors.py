"""Errors about arguments of `DPO` name the flags of the command line."""

import pytest

from dpo_wrapper.training.flags_in_errors import flags_in_errors, name_flags
from dpo_wrapper.training.plan import plan_run
from dpo_wrapper.training.stopping import TrainingError
from dpo_wrapper.training.train import train
from helpers.lora_runs import save_llama
from helpers.runs import make_config


@pytest.mark.parametrize(
    ("of_module", "of_command"),
    [
        ("prefixes are not shared: use share_prefix = 'auto'.", "--share-prefix auto"),
        ("no layer does: use router_aux_loss_coef = 0.", "--router-aux-loss-coef 0"),
        ("cannot be mixed: use reference = 'copy'.", "--reference copy"),
        ("reference_device should be a device", "--reference-device should"),
        ("leave precompute_ref_log_probs out", "leave --precompute-ref-log-probs out"),
        ("ld_alpha needs the log-prob of each token", "--ld-alpha needs"),
    ],
)
def test_arguments_become_flags(of_module, of_command):
    text = name_flags(of_module)
    assert of_command in text and "_" not in text and "=" not in text


@pytest.mark.parametrize(
    "text",
    [
        "give a separately built model as reference = module.",
        "make it with precompute_ref_log_probs(..., per_token = True).",
        "/data/max_length/batch_size.jsonl cannot be read",
        "got an unexpected keyword argument 'weight_decay'",
        "the parameter layers.0.lora_dropout should train",
        "--on-nan should be stop or skip",
    ],
)
def test_other_text_stays(text):
    assert name_flags(text) == text


@pytest.mark.parametrize("error", [ValueError, TypeError, TrainingError])
def test_the_kind_of_an_error_stays(error):
    with pytest.raises(error, match=r"^--ld-alpha is wrong$"), flags_in_errors():
        raise error("ld_alpha is wrong")
    with pytest.raises(UnicodeDecodeError), flags_in_errors():
        b"\xff".decode("utf-8")


@pytest.mark.slow
def test_refusals_of_a_run_name_its_flags(rows, tmp_path):
    """Rotary frequencies of dynamic NTK depend on the longest sequence of a batch."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = save_llama(tmp_path / "dynamic", rope_parameters=rope, max_position_embeddings=32)
    options = {"sft_epochs": 0, "model": str(dynamic)}
    remedy = r"batches longer than 32 tokens, .*: leave --precompute-ref-log-probs out"
    with pytest.raises(ValueError, match=remedy):
        train(make_config(rows, tmp_path / "a", precompute_ref_log_probs=True, **options))
    for run in (train, plan_run):
        with pytest.raises(ValueError, match=r"^--router-aux-loss-coef should be 0 or None where no loss"):
            run(make_config(rows, tmp_path / "b", router_aux_loss_coef=0.1, **options))
    with pytest.raises(
        ValueError, match=r"^--reference-device should be a device of this machine, .* 'none' "
    ):
        train(make_config(rows, tmp_path / "c", reference_device="none", **options))
