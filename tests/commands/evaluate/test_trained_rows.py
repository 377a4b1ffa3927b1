"""Rows that a run was trained on are told from others, whatever file they come from."""

import csv
import json
import shutil

import numpy as np
import pytest

from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.evaluate.run_evaluation import run_evaluation
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.data.prepare.run import prepare_data
from dpo_wrapper.data.trained_prompts import TRAINED_PROMPTS_FILE
from dpo_wrapper.training.train import train
from helpers.datasets import write_rows
from helpers.models import hf_llama
from helpers.runs import QUICK, make_config, read_metrics
from helpers.tokenizers import CHATML, save_tokenizer

NUM_ROWS, FRACTION = 20, 0.3
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
)
TRAINED_ON_ALL = "the run was trained on these rows: their figures are not those of new ones."
NOT_TOLD_APART = "rows that the run was trained on are not told apart here"


def make_rows(count=NUM_ROWS):
    """Every prompt but the first has two rows."""
    numbers = [(k + 1) // 2 for k in range(count)]
    return [
        {"prompt": f"{n} + {n}?", "chosen": f"{2 * n}", "rejected": f"no, {k}"} for k, n in enumerate(numbers)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose chat template writes a system message, and which holds some prompts out."""
    folder = tmp_path_factory.mktemp("trained")
    model = hf_llama(0, vocab_size=420, max_position_embeddings=256)
    model.save_pretrained(folder / "llama")
    save_tokenizer(folder / "llama", template=DEFAULT_SYSTEM, eos="<|im_end|>")
    data = write_rows(folder / "rows.jsonl", make_rows())
    options = QUICK | {"sft_epochs": 0, "eval_fraction": FRACTION, "model": str(folder / "llama")}
    train(make_config(data, folder / "run", **options))
    return folder / "run"


@pytest.fixture
def old_run(run, tmp_path):
    """The run as it was before there was a file of prompts."""
    shutil.copytree(run, tmp_path / "old")
    (tmp_path / "old" / TRAINED_PROMPTS_FILE).unlink()
    return tmp_path / "old"


def evaluate(model, data, out, **options):
    """The notes, and the prompts of the pairs that were scored, one for each pair."""
    shutil.rmtree(out, ignore_errors=True)
    settings = {"resamples": 100, "cpu": True} | options
    content = run_evaluation(EvaluateConfig(model=str(model), data=data, out=out, **settings))
    lines = (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    notes = [note for note in content["notes"] if not note.startswith(("as in the run", "In "))]
    return notes, sorted(json.loads(line)["prompt"] for line in lines)


def count_left_out(number):
    return f"{number:,} rows are left out, for their prompts are in the training data of the run."


@pytest.fixture(scope="module")
def held_out(run, tmp_path_factory):
    """What the evaluation of the run's own file says and scores, and the indices of its rows."""
    notes, prompts = evaluate(run, run.parent / "rows.jsonl", tmp_path_factory.mktemp("own") / "out")
    last = next(record for record in reversed(read_metrics(run)) if record["part"] == "eval")
    assert len(prompts) == last["pairs/valid"] and notes == [count_left_out(NUM_ROWS - len(prompts))]
    trained, scored = set(np.load(run / TRAINED_PROMPTS_FILE).tolist()), {int(one, 16) for one in prompts}
    assert not trained & scored
    assert len(trained) + len(scored) == len({row["prompt"] for row in make_rows()})
    return notes, prompts


def as_turns(role, text):
    return [{"role": role, "content": text}]


def as_messages(row):
    sides = {side: as_turns("assistant", row[side]) for side in ("chosen", "rejected")}
    return {"prompt": as_turns("user", row["prompt"])} | sides


def as_dialogues(row):
    question = as_turns("user", row["prompt"])
    return {side: question + as_turns("assistant", row[side]) for side in ("chosen", "rejected")}


def as_text(row):
    return {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}


def as_sharegpt(row):
    sides = {side: {"from": "gpt", "value": row[side]} for side in ("chosen", "rejected")}
    return {"conversations": [{"from": "human", "value": row["prompt"]}]} | sides


def as_list(row):
    return {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]}


def as_other_answers(row):
    return {"prompt": row["prompt"], "chosen": "Yes.", "rejected": "No."}


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


FORMS = (dict, as_messages, as_dialogues, as_text, as_sharegpt, as_list, as_other_answers)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_rows_of_any_form_are_told_apart(run, held_out, tmp_path, form):
    """Under another name and in another order; one of them is a copy of the run's own file."""
    data = write_rows(tmp_path / "other.jsonl", [form(row) for row in reversed(make_rows())])
    assert evaluate(run, data, tmp_path / "out") == held_out


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_files_of_any_kind_are_told_apart(run, held_out, tmp_path, ending):
    write = {"csv": write_csv, "parquet": write_parquet}[ending]
    data = write(tmp_path / f"other.{ending}", make_rows())
    assert evaluate(run, data, tmp_path / "out") == held_out


def test_prepared_data_is_told_apart(run, held_out, tmp_path):
    data = write_rows(tmp_path / "other.jsonl", make_rows())
    options = {"tokenizer": str(run), "max_length": 128, "workers": 1}
    prepare_data(PrepareConfig(data=data, out=tmp_path / "prepared", **options))
    assert evaluate(run, tmp_path / "prepared", tmp_path / "out") == held_out


@pytest.mark.parametrize("is_prepared", [False, True])
def test_cuts_are_counted_of_the_rows_that_are_left(run, held_out, tmp_path, is_prepared):
    rows = [row | {"rejected": "no" * 200} if k % 4 < 3 else row for k, row in enumerate(make_rows())]
    data = write_rows(tmp_path / "long.jsonl", rows)
    if is_prepared:
        options = {"tokenizer": str(run), "max_length": 128, "workers": 1}
        prepare_data(PrepareConfig(data=data, out=tmp_path / "prepared", **options))
        data = tmp_path / "prepared"
    notes, prompts = evaluate(run, data, tmp_path / "out")
    lines = (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    lengths = [json.loads(line)["length/rejected"] for line in lines]
    num_cut = sum(length > 50 for length in lengths)
    assert prompts == held_out[1] and 0 < num_cut < len(prompts)
    assert notes[-1] == f"Cut to the maximum length: {num_cut} of {len(prompts)} pairs."


def test_other_rows_are_new_and_a_subset_is_told_apart(run, held_out, tmp_path):
    """Rows of the run beside those of others: half of its own rows, and rows with other prompts."""
    half = make_rows()[: NUM_ROWS // 2]
    new = [row | {"prompt": f"Why {row['prompt']}"} for row in make_rows()]
    own_notes, own_prompts = evaluate(run, write_rows(tmp_path / "half.jsonl", half), tmp_path / "out")
    assert 0 < len(own_prompts) < len(half) and set(own_prompts) <= set(held_out[1])
    assert own_notes == [count_left_out(len(half) - len(own_prompts))]
    files = (tmp_path / "half.jsonl", write_rows(tmp_path / "new.jsonl", new))
    notes, prompts = evaluate(run, files, tmp_path / "out")
    assert notes == own_notes and len(prompts) == len(own_prompts) + len(new)
    notes, prompts = evaluate(run, files[1], tmp_path / "out")
    assert notes == [] and len(prompts) == len(new)


def test_rows_that_were_all_trained_on_are_evaluated_with_a_warning(run, held_out, tmp_path):
    trained = set(np.load(run / TRAINED_PROMPTS_FILE).tolist())
    data = write_rows(tmp_path / "all.jsonl", make_rows())
    evaluate(run.parent / "llama", data, tmp_path / "out")  # whose lines have hashes of all prompts
    lines = map(json.loads, (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [row for row, line in zip(make_rows(), lines, strict=True) if int(line["prompt"], 16) in trained]
    notes, prompts = evaluate(run, write_rows(tmp_path / "trained.jsonl", rows), tmp_path / "out")
    assert notes == [TRAINED_ON_ALL] and len(prompts) == len(rows) == NUM_ROWS - len(held_out[1])


def test_rows_that_are_marked_as_test_are_told_apart_too(run, held_out, tmp_path):
    rows = [row | {"split": "train" if k < 4 else "test"} for k, row in enumerate(make_rows())]
    notes, prompts = evaluate(run, write_rows(tmp_path / "marked.jsonl", rows), tmp_path / "out")
    assert len(prompts) > 0 and set(prompts) <= set(held_out[1])
    assert notes == [
        "4 rows are left out, for they are not marked as test, as others are.",
        count_left_out(NUM_ROWS - 4 - len(prompts)),
    ]


def test_a_system_message_of_a_row_makes_another_prompt(run, tmp_path):
    """As where rows are split; the one that the chat template writes is in no row."""
    rows = [row | {"system": "Be brief."} for row in make_rows()]
    notes, prompts = evaluate(run, write_rows(tmp_path / "brief.jsonl", rows), tmp_path / "out")
    assert notes == [] and len(prompts) == NUM_ROWS


def test_a_copy_of_the_model_is_as_good_as_the_run(run, held_out, tmp_path):
    """Also without run.json; where the file of prompts is missing, nothing is known."""
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("run.json", "metrics.jsonl"))
    data = write_rows(tmp_path / "other.jsonl", make_rows())
    assert evaluate(tmp_path / "copy", data, tmp_path / "out") == held_out
    (tmp_path / "copy" / TRAINED_PROMPTS_FILE).unlink()
    notes, prompts = evaluate(tmp_path / "copy", data, tmp_path / "out")
    assert notes == [] and len(prompts) == NUM_ROWS


def test_a_run_without_the_file_tells_its_own_data_apart(run, old_run, held_out, tmp_path):
    own = run.parent / "rows.jsonl"
    assert evaluate(old_run, own, tmp_path / "out") == held_out
    other = write_rows(tmp_path / "other.jsonl", make_rows())
    notes, prompts = evaluate(old_run, other, tmp_path / "out")
    assert len(notes) == 1 and notes[0].startswith(NOT_TOLD_APART) and len(prompts) == NUM_ROWS
    rewrite_settings(old_run, eval_fraction=0.0)
    notes, prompts = evaluate(old_run, own, tmp_path / "out")
    assert notes == [TRAINED_ON_ALL] and len(prompts) == NUM_ROWS


def rewrite_settings(folder, **settings):
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    content["settings"] |= settings
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
