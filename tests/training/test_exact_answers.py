"""A run says how many eval prompts its model answers exactly, before and after preference training."""

import json

import pytest

from dpo_wrapper.training.train import train
from helpers.runs import make_config, read_metrics


def write_pairs(path, chosen):
    rows = [
        {"prompt": f"Say {k}.", "chosen": chosen, "rejected": "I would rather not say it today."}
        for k in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_exact_answers_stand_in_the_log_and_in_the_table(tmp_path, capsys):
    data = write_pairs(tmp_path / "short.jsonl", "It.")
    options = {"eval_fraction": 0.3, "sft_learning_rate": 1e-2, "learning_rate": 1e-2, "save_steps": 0}
    train(make_config(data, tmp_path / "run", epochs=8, loss="sigmoid + 5.0*sft", **options))
    log = read_metrics(tmp_path / "run")
    rates = [(record["stage"], record["part"], record["step"], record.get("exact_answers")) for record in log]
    answered = [rate for *where, rate in rates if where[:2] == ["dpo", "eval"]]
    assert answered[0] < answered[-1] == 1
    assert all(rate is None for rate in answered[1:-1])
    assert not any(rate is not None for *where, rate in rates if where[:2] != ["dpo", "eval"])
    printed = capsys.readouterr().out
    assert "exact answers" in printed
    prompt, _, policy, chosen = printed[printed.index("prompt  ") :].splitlines()[:4]
    assert prompt.split()[1] == "Say" and policy.split() == ["policy", "It."] and chosen.endswith(" It.")


@pytest.mark.slow
@pytest.mark.parametrize("chosen, options", [("It is that.", {"exact_answers": 0}), (40 * "It. ", {})])
def test_no_prompt_is_answered_where_none_is_asked_for_or_answers_are_long(tmp_path, chosen, options, capsys):
    data = write_pairs(tmp_path / "rows.jsonl", chosen)
    train(make_config(data, tmp_path / "run", epochs=1, eval_fraction=0.3, save_steps=0, **options))
    records = [record for record in read_metrics(tmp_path / "run") if record["part"] == "eval"]
    assert records and not any("exact_answers" in record for record in records)
    assert "exact answers" not in capsys.readouterr().out
