"""`dpo-wrapper prepare --out`: what is written, what is refused, and what an interruption leaves."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_wrapper import cli
from dpo_wrapper.data import ByteTokenizer
from dpo_wrapper.data.prepare import join, part_maker, parts, report_page
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.data.prepare.run import prepare_data
from dpo_wrapper.data.prepared import PreparedData
from dpo_wrapper.data.readers import read_examples
from helpers.datasets import write_rows
from helpers.marks import mark_slow_except
from helpers.runs import BUNDLED

BYTES = ByteTokenizer()
PAIRS = [{"prompt": f"{k}+{k}?", "chosen": str(2 * k), "rejected": "no"} for k in range(30)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_PART_ROWS", 7)


def prepare(data: Any, out: Path, **options: Any) -> PreparedData:
    prepared = prepare_data(PrepareConfig(data=data, out=out, **({"workers": 1} | options)))
    assert prepared is not None
    return prepared


def test_files_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        *PAIRS,
        PAIRS[3],
        {"prompt": "1?", "chosen": "2", "rejected": "2"},
        {"prompt": "1?", "response_a": "2", "response_b": "3", "winner": "tie"},
        {"prompt": "1?", "chosen": 3, "rejected": "2"},
        {"prompt": "2?", "chosen": "3"},
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with file.open("a") as stream:
        stream.write("{broken\n")
    cli.main(
        ["prepare", "--data", str(file), "--out", str(tmp_path / "out"), "--on-bad-row", "skip", "--dedupe"]
    )
    text = capsys.readouterr().out
    assert "Rows: 36 read = 30 written + 5 refused + 1 duplicates." in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data-00000.arrow", "manifest.json", "refused.jsonl", "report.html",
    ]  # fmt: skip
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"], entry.get("field")) for entry in refused] == [
        ("a.jsonl", 32, None), ("a.jsonl", 33, None), ("a.jsonl", 34, "chosen"), ("a.jsonl", 35, "rejected"),
        ("a.jsonl", 36, None),
    ]  # fmt: skip
    assert [entry["reason"].split(" ")[0] for entry in refused] == ["all", "no", "the", "a", "the"]
    data = PreparedData.open(tmp_path / "out")
    assert [BYTES.decode(one.chosen) for one in data.examples] == [row["chosen"] for row in PAIRS]
    assert data.manifest["dataset_types"] == {"preference": 30} and data.manifest["counts"]["examples"] == 30


def test_the_first_bad_row_stops_the_program_and_nothing_loads(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "1?", "chosen": 3, "rejected": "2"}, {}])
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"a.jsonl, line 31, field 'chosen': .* but it is the number 3"):
            prepare(file, tmp_path / "out", workers=workers)
        with pytest.raises(ValueError, match=r"run dpo-wrapper prepare --out .* to the end"):
            PreparedData.open(tmp_path / "out")
    assert prepare(file, tmp_path / "out", on_bad_row="skip").manifest["counts"]["refused"] == 2


def test_nothing_to_write(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "1?", "chosen": "2", "rejected": "2"}])
    with pytest.raises(
        ValueError, match=r"all 1 are refused, the first because of this: all completions are"
    ):
        prepare(file, tmp_path / "out")
    with pytest.raises(ValueError, match="no row has 'q' for system: correct the name"):
        prepare(write_rows(tmp_path / "b.jsonl", PAIRS), tmp_path / "out", columns=("system=q",))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The bundled data, prepared by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MAX_PART_ROWS", 7)
        return prepare(BUNDLED, tmp_path_factory.mktemp("bundled") / "one")


@pytest.mark.parametrize("workers", mark_slow_except([2], [2, 3]))
def test_workers_write_what_one_process_writes(tmp_path: Path, bundled: PreparedData, workers: int) -> None:
    several = prepare(BUNDLED, tmp_path / "several", workers=workers)
    assert several.manifest == bundled.manifest and list(several.examples) == list(bundled.examples)
    for name in ("data-00000.arrow", "report.html", "refused.jsonl"):
        assert (bundled.folder / name).read_bytes() == (tmp_path / "several" / name).read_bytes()


def test_the_same_again_does_nothing_and_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_rows(tmp_path / "a.jsonl", PAIRS), tmp_path / "out"
    prepare(file, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "work-0").mkdir()  # left behind where the program was killed at its end
    capsys.readouterr()
    prepare(file, out)
    assert "holds this data already, prepared with these options: nothing is done." in capsys.readouterr().out
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"has data prepared with max-length 512 instead of 256: name a new"):
        prepare(file, out, max_length=256)
    with pytest.raises(ValueError, match="has data prepared with dedupe False instead of True"):
        prepare(file, out, dedupe=True)
    write_rows(file, PAIRS[1:])
    with pytest.raises(ValueError, match="has data of other files"):
        prepare(file, out)
    with pytest.raises(ValueError, match=r"--out should be a new or empty folder, but .* holds a.jsonl"):
        prepare(file, tmp_path)


class StoppedError(BaseException):
    pass


@pytest.mark.slow
def test_an_interruption_at_any_write_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each file is written: the folder does not load, and the next run ends alike."""
    monkeypatch.setattr(report_page, "draw_lengths", lambda features: [])  # longer than all else
    file, out = write_rows(tmp_path / "a.jsonl", PAIRS), tmp_path / "out"
    expected = prepare(file, tmp_path / "whole").manifest
    steps = [
        (part_maker, "write_batches"), (part_maker, "write_whole"), (part_maker.np, "savez"),
        (join, "write_batches"), (join, "write_whole"), (join, "write_report"),
        (join.shutil, "rmtree"),
    ]  # fmt: skip
    num_stops = 0
    for moment in range(100):
        count = 0

        def stopping(function: Any, moment: int = moment) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == moment // 2 + 1 and moment % 2:
                    raise StoppedError
                result = function(*args, **kwargs)
                if count == moment // 2 + 1:
                    raise StoppedError
                return result

            return call

        with pytest.MonkeyPatch.context() as patch:
            for module, name in steps:
                patch.setattr(module, name, stopping(getattr(module, name)))
            try:
                prepare(file, out)
            except StoppedError:
                num_stops += 1
            else:
                break
        if (out / "manifest.json").exists():  # stopped while parts were deleted
            assert PreparedData.open(out).manifest == expected
        else:
            with pytest.raises(ValueError, match="to the end"):
                PreparedData.open(out)
        assert prepare(file, out).manifest == expected
        shutil.rmtree(out)
    assert num_stops > 30


ANSWERS = st.sampled_from(["yes", "no", " no", "", "ja", "7"])
ROWS = st.one_of(
    st.fixed_dictionaries({"prompt": st.sampled_from("abc"), "chosen": ANSWERS, "rejected": ANSWERS}),
    st.fixed_dictionaries(
        {"prompt": st.sampled_from("abc"), "completions": st.lists(ANSWERS, min_size=1, max_size=4)}
    ),
    st.fixed_dictionaries({"prompt": st.sampled_from("abc"), "completion": ANSWERS, "label": st.booleans()}),
    st.just({"prompt": "a", "chosen": None}),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROWS, min_size=1, max_size=30), st.booleans())
def test_counts_add_up_and_examples_decode_to_their_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], dedupe: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [*rows, PAIRS[0]]
    file = write_rows(folder / "a.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "write_report", lambda *content: None)  # drawing takes longer than all else
        data = prepare(file, folder / "out", on_bad_row="skip", dedupe=dedupe, allow_empty=True)
    counts = data.manifest["counts"]
    refused = [json.loads(line) for line in (folder / "out" / "refused.jsonl").read_text().splitlines()]
    assert counts["read"] == len(rows) == counts["written"] + counts["refused"] + counts["duplicates"]
    assert len(refused) == counts["refused"] and len(data.examples) == counts["written"]
    read = {example.source: example for example in read_examples(file, on_error="skip").examples}
    written = Counter()
    for one in data.examples:
        example = read.pop(one.source)
        assert not one.is_cut and BYTES.decode(one.prompt) == example.prompt and one.label == example.label
        assert tuple(map(BYTES.decode, one.completions)) == example.completions
        written[example.prompt, example.completions, example.label] += 1
    assert not dedupe or max(written.values()) == 1
    left_out = {f"{entry['file']}, line {entry['line']}" for entry in refused}
    for example in read.values():  # a duplicate, or refused for its tokens
        assert example.source in left_out or written[example.prompt, example.completions, example.label]


def test_documents_become_several_examples_of_one_row(tmp_path: Path) -> None:
    rows = [{"text": "".join(random.Random(k).choices("abc ", k=150 * k + 1))} for k in range(5)]
    data = prepare(
        write_rows(tmp_path / "a.jsonl", [*rows, rows[4]]), tmp_path / "out", max_length=64, dedupe=True
    )
    assert data.manifest["counts"] | {"examples": 0} == {
        "read": 6, "written": 5, "refused": 0, "duplicates": 1, "examples": 0,
    }  # fmt: skip
    texts: dict[str, str] = {}
    for one in data.examples:
        texts[one.source] = texts.get(one.source, "") + BYTES.decode(one.completions[0])
    assert list(texts.values()) == [row["text"] for row in rows]
    assert (
        data.manifest["dataset_types"] == {"language_modeling": len(data.examples)}
        and len(data.examples) > 20
    )
    assert data.manifest["longest"] <= 64


def test_files_of_several_kinds_and_a_forced_one(tmp_path: Path) -> None:
    files = [
        write_rows(tmp_path / "documents.jsonl", [{"text": "Once upon a time."}]),
        write_rows(tmp_path / "sft.jsonl", [{"prompt": "1+1?", "completion": "2"}]),
        write_rows(tmp_path / "pairs.jsonl", [*PAIRS[:3], {"prompt": "9?", "completions": ["a", "b", "c"]}]),
    ]
    data = prepare(tuple(files), tmp_path / "out")
    assert data.manifest["dataset_types"] == {
        "preference": 3, "ranked": 1, "prompt_completion": 1, "language_modeling": 1,
    }  # fmt: skip
    pairs = prepare(files[2], tmp_path / "pairs", kind="preference")
    assert pairs.manifest["dataset_types"] == {"preference": 6} and pairs.manifest["counts"]["written"] == 4
    labelled = prepare(files[2], tmp_path / "labelled", kind="unpaired_preference", on_bad_row="skip")
    assert labelled.manifest["dataset_types"] == {"unpaired_preference": 6}
    assert labelled.manifest["counts"] | {"examples": 6} == {
        "read": 4, "written": 3, "refused": 1, "duplicates": 0, "examples": 6,
    }  # fmt: skip


def test_examples_are_shown_beside_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "a.jsonl", PAIRS)
    cli.main(["prepare", "--data", str(file), "--out", str(tmp_path / "out"), "--preview", "1"])
    text = capsys.readouterr().out
    assert text.startswith("── 1 of 30: a.jsonl, line 1 ──\nprompt    <bos>0+0?\nchosen    ⟦0<eos>⟧\n")
    assert "30 written" in text and "── 2" not in text
    cli.main(["prepare", "--data", str(tmp_path / "out"), "--preview", "1"])
    assert capsys.readouterr().out == text.rpartition("The data is in")[0]
    with pytest.raises(ValueError, match=r"--data should be files, but .*out is prepared data already"):
        prepare(tmp_path / "out", tmp_path / "again")


def test_what_is_read_and_cut_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{**row, "margin": 1.0, "loss_masking_spans": [[0, 1]]} for row in PAIRS]
    rows += [{"prompt": "a" * 40, "chosen": "b", "rejected": "c"}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    cli.main(["prepare", "--data", str(file), "--out", str(tmp_path / "out"), "--max-length", "24"])
    text = capsys.readouterr().out
    assert "30 rows have loss_masking_spans, which are ignored" in text
    assert "30 rows have a margin, which the loss takes as nats" in text
    assert "Cut to the maximum length: 1 prompt (earliest text)." in text


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out should be a folder, but \S+file is a file: name a new"):
        prepare(file, tmp_path / "file" / "out")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for module in (part_maker, join):
        with (
            monkeypatch.context() as patch,
            pytest.raises(ValueError, match=r"No space .* same command goes on"),
        ):
            patch.setattr(module, "write_batches", fail)
            prepare(file, tmp_path / "out")
    assert prepare(file, tmp_path / "out").manifest["counts"]["written"] == 30


def test_strict_ends_with_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{k}?", "chosen": f" {k}", "rejected": f"no {k}"} for k in range(60)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(SystemExit) as error:
        cli.main(["prepare", "--data", str(file), "--out", str(tmp_path / "out"), "--strict"])
    assert error.value.code == 3 and "problem:" in capsys.readouterr().out
    cli.main(["prepare", "--data", str(BUNDLED), "--out", str(tmp_path / "bundled"), "--strict"])
    assert "problem:" not in capsys.readouterr().out
