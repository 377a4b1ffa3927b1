"""Models whose layers carry a state along the sequence train over a prefix tree, and the run says so."""

import pytest
import torch
from torch import nn

from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import run_training
from helpers.runs import make_config, read_metrics
from helpers.shareable_models import hf

CHUNKS = {"n_groups": 1, "state_size": 8, "chunk_size": 8}
MAMBA = {f"mamba_{name}": value for name, value in CHUNKS.items() if name != "state_size"} | {
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
}
DELTA = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

HYBRIDS = {
    "Qwen3NextGatedDeltaNet": hf(
        "Qwen3Next",
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        shared_expert_intermediate_size=8,
        vocab_size=300,
        **DELTA,
        **EXPERTS,
    ),
    "Mamba2Mixer": hf("Mamba2", num_heads=4, head_dim=8, expand=2, vocab_size=300, **CHUNKS),
    "Lfm2ShortConv": hf("Lfm2", layer_types=["conv", "full_attention"], vocab_size=300),
    "FalconH1Mixer": hf("FalconH1", head_dim=8, mamba_d_ssm=32, vocab_size=300, **MAMBA),
}
"""Models by the class of the layers with a state."""


def naive_log_prob(model: nn.Module, prompt: list[int], completion: list[int]) -> float:
    """Of one completion, in a row of its own without padding."""
    ids = torch.tensor([[*prompt, *completion]])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())


@pytest.mark.slow
@pytest.mark.parametrize("layer", HYBRIDS)
def test_a_hybrid_model_trains_over_a_prefix_tree_and_says_so(rows, tmp_path, capsys, layer):
    folder = tmp_path / "model"
    HYBRIDS[layer](0).save_pretrained(folder)
    options = {"model": str(folder), "tokenizer": "bytes", "max_length": 40, "batch_size": 11, "epochs": 1}
    setup = set_up_training(
        make_config(rows, tmp_path / "out", sft_epochs=0, learning_rate=1e-3, save_steps=0, **options)
    )
    model, examples = setup.pretrained.model.eval(), setup.stages[0].splits.eval
    with torch.no_grad():
        expected = [
            sum(naive_log_prob(model, one.prompt, one.completions[k]) for one in examples) / len(examples)
            for k in (0, 1)
        ]
    run_training(setup)

    log = read_metrics(tmp_path / "out")
    assert sum(record["part"] == "step" for record in log) == 2
    before, after = (
        next(record for record in records if record["part"] == "train") for records in (log, log[::-1])
    )
    assert after["loss"] < before["loss"] and after["rewards/margins"] > 0.01
    before = next(record for record in log if record["part"] == "eval")
    actual = [before["logps/chosen"], before["logps/rejected"]]
    assert actual == pytest.approx(expected, rel=1e-4)
    printed = capsys.readouterr().out
    assert printed.count("shared prefixes are computed once") == 1
    assert f"its {layer} layers pass their state on to each branch" in printed
