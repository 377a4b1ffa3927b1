"""The prompts that a run notes: of each stage, of runs before it, and of a run that goes on."""

import pytest

from dpo_wrapper.data import Example, read_examples
from dpo_wrapper.data.split import prompt_digest
from dpo_wrapper.data.trained_prompts import TRAINED_PROMPTS_FILE, read_trained_prompts
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Trainer
from helpers.datasets import write_rows
from helpers.lora_runs import make_lora_config
from helpers.runs import QUICK, SMALL_DECODER, InterruptedRunError, interrupt_training, make_config


def hold_out(rows, count=2):
    """The rows, of which the first ones are marked as test."""
    return [row | {"split": "test" if k < count else "train"} for k, row in enumerate(rows)]


DOCUMENTS = hold_out([{"text": f"{k} and {k} make {2 * k}. " * 9} for k in range(5)])
ANSWERS = hold_out([{"prompt": f"{k}/1?", "completion": f"{k}"} for k in range(5)])
PAIRS = hold_out([{"prompt": f"{k}+{k}?", "chosen": str(2 * k), "rejected": f"no, {k}"} for k in range(6)])


def hashes(*prompts):
    return {prompt_digest(Example(prompt, ("",))) for prompt in prompts}


def train_prompts(rows):
    return hashes(*(row["prompt"] for row in rows if row["split"] == "train"))


def read(folder):
    """The hashes that a folder has, which are sorted and differ."""
    digests = read_trained_prompts(folder).tolist()
    assert digests == sorted(set(digests))
    return set(digests)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Files of documents, of completions and of pairs."""
    folder = tmp_path_factory.mktemp("mixed")
    kinds = {"documents": DOCUMENTS, "answers": ANSWERS, "pairs": PAIRS}
    return tuple(write_rows(folder / f"{name}.jsonl", rows) for name, rows in kinds.items())


@pytest.fixture(scope="module")
def first(mixed, tmp_path_factory):
    """A run of three stages, one for each of the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        return train(make_config(mixed, tmp_path_factory.mktemp("runs") / "first", **QUICK)).path


def test_each_stage_has_what_was_trained_on_until_then(mixed, first):
    documents = {prompt_digest(example) for example in read_examples([mixed[0]], kind="auto").examples[2:]}
    assert len(documents) == 3 and read(first / "pretrain") == documents
    assert read(first / "sft") == documents | train_prompts(ANSWERS)
    assert read(first) == documents | train_prompts(ANSWERS) | train_prompts(PAIRS)


def test_rows_of_a_stage_that_the_run_has_not_are_left_out(mixed, tmp_path):
    run = train(make_config(mixed, tmp_path / "run", **QUICK, stage=("dpo",), sft_epochs=None))
    assert read(run.path) == train_prompts(PAIRS)


@pytest.mark.parametrize("loss", ["kto", "plackettluce"])
def test_the_prompts_of_preferences_are_noted_whatever_they_become(mixed, tmp_path, loss):
    run = train(make_config(mixed[2], tmp_path / "run", **QUICK, loss=loss, sft_epochs=0))
    assert read(run.path) == train_prompts(PAIRS)


def test_prompts_are_noted_before_the_first_step(mixed, first, tmp_path, monkeypatch):
    def interrupt(self):
        raise InterruptedRunError

    monkeypatch.setattr(Trainer, "train", interrupt)
    with pytest.raises(InterruptedRunError):
        train(make_config(mixed, tmp_path / "run", **QUICK))
    assert read(tmp_path / "run") == read(first)


@pytest.mark.parametrize(("stage", "num_known"), [("", 2), ("sft", 1)])
def test_a_run_adds_to_the_prompts_of_the_model_that_it_begins_with(first, tmp_path, stage, num_known):
    """It counts the eval prompts that the model was trained on before, one of them after two stages."""
    prompts = [*(f"{k}?" for k in range(8)), PAIRS[-1]["prompt"], ANSWERS[-1]["prompt"]]
    splits = ["train"] * 7 + ["test"] * 3
    rows = [
        {"prompt": prompt, "chosen": "a", "rejected": "b", "split": split}
        for prompt, split in zip(prompts, splits, strict=True)
    ]
    data = write_rows(tmp_path / "new.jsonl", rows)
    config = make_config(data, tmp_path / "run", **QUICK, model=str(first / stage), sft_epochs=0)
    notes = set_up_training(config).notes
    assert any(note.startswith(f"{num_known} of the 3 eval examples have prompts") for note in notes)
    assert read(train(config).path) == read(first / stage) | train_prompts(rows)


@pytest.mark.parametrize("kind", ["fresh", "continued", "on its base"])
def test_an_adapter_adds_to_the_prompts_of_its_base_and_of_the_adapter_that_it_continues(
    mixed, llama, lora_run, tmp_path, kind
):
    options = {
        "fresh": {"model": llama},
        "continued": {"model": llama, "adapter": lora_run},
        "on its base": {"model": lora_run},
    }[kind]
    run = train(make_lora_config(mixed[2], tmp_path / "run", **(QUICK | options)))
    assert read(run.path) == train_prompts(PAIRS) | (set() if kind == "fresh" else read(lora_run))


def test_a_run_that_goes_on_keeps_its_prompts(mixed, first, tmp_path):
    """What it began with is gone by then; a run without the file has one in the end."""
    options = QUICK | {"save_steps": 1, "batch_size": 2, "model": str(first), "sft_epochs": 0}
    outs = [tmp_path / "run", tmp_path / "without"]
    for out in outs:
        with interrupt_training("dpo", after_steps=1):
            train(make_config(mixed[2], out, **options))
        assert read(out) == read(first) | train_prompts(PAIRS)
    (outs[1] / TRAINED_PROMPTS_FILE).unlink()
    file, away = first / TRAINED_PROMPTS_FILE, tmp_path / TRAINED_PROMPTS_FILE
    file.rename(away)
    try:
        for out in outs:
            train(make_config(mixed[2], out, **options))
    finally:
        away.rename(file)
    assert read(outs[0]) == read(first) | train_prompts(PAIRS) and read(outs[1]) == train_prompts(PAIRS)


def test_a_damaged_file_is_told_before_training(mixed, lora_run, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in lora_run.glob("*adapter*"):
        (adapter / file.name).write_bytes(file.read_bytes())
    (adapter / TRAINED_PROMPTS_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match="should hold the hashes of the prompts that the model was trained"):
        set_up_training(make_lora_config(mixed[2], tmp_path / "run", adapter, **QUICK))
