"""`dpo-wrapper export`: what stands in its place is whole and agrees with the model; all else is said."""

import errno
import re
import signal
import time

import pytest
from safetensors import SafetensorError

from dpo_wrapper.cli import main
from dpo_wrapper.commands.export import run, source
from dpo_wrapper.commands.export.agreement import ExportError
from dpo_wrapper.commands.export.place import UNFINISHED, ExportPlace
from dpo_wrapper.pretrained import load_pretrained
from helpers.exports import export_to, flip_lowest_bit, read_record
from helpers.forked_scripts import ForkedCommand


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def spoil(monkeypatch):
    """Let the writer of merged models do something after it has written."""

    def spoil_with(act):
        write = run.WRITERS["merged"]

        def write_and_spoil(source, folder, config):
            exported = write(source, folder, config)
            act(folder)
            return exported

        monkeypatch.setitem(run.WRITERS, "merged", write_and_spoil)

    return spoil_with


def test_the_command_says_what_was_compared_and_how_to_use_it(adapter, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(adapter), "--to", "merged", "peft", "--out", str(out), "--num-tokens", "2"]
    main([*arguments, "--dtype", "float32", "--prompts", "Hello", "Bye"])
    printed = capsys.readouterr()
    peft, merged = printed.out.split("merged: ")
    assert peft.startswith(f"peft: {out / 'peft'}\n  PEFT: logits differ by ")
    assert re.search(r"4 of 4 greedy tokens .*\n  all \d+ tensors are those of the model in float32", peft)
    assert merged.endswith(f'    AutoModelForCausalLM.from_pretrained("{out / "merged"}")\n')
    assert UNFINISHED not in printed.out and "Warning" not in printed.err
    assert list_names(out) == ["merged", "peft"]
    record = read_record(out / "merged")
    assert (record["status"], record["format"], record["model"]) == ("verified", "merged", str(adapter))
    assert record["settings"]["num_tokens"] == 2
    agreement, *_ = record["agreements"]  # and that of mlx-lm, where it is there
    assert agreement["num_equal"] == 4 and agreement["difference"] < 1e-5
    assert sorted([*record["files"], "export.json"]) == list_names(out / "merged")


def test_what_differs_is_kept_apart_and_cannot_be_loaded(adapter, tmp_path, spoil, capsys):
    assert export_to(tmp_path, adapter, "merged") == 0
    before = (tmp_path / "merged" / "model.safetensors").read_bytes()
    spoil(flip_lowest_bit)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["export", str(adapter), "--to", "merged", "--out", str(tmp_path), "--num-tokens", "2"])
    assert ended.value.code == 1
    kept = tmp_path / "merged.differs"
    assert capsys.readouterr().out.endswith(f"do not use it. It is kept in {kept} for a look.\n")
    assert list_names(tmp_path) == ["merged", "merged.differs"]
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=f"but that in {kept} differs from it: export {adapter} again"):
        load_pretrained(str(kept), None, 64)


def test_an_export_that_agrees_takes_the_place_of_earlier_ones(llama, adapter, tmp_path, spoil, monkeypatch):
    with monkeypatch.context():
        spoil(flip_lowest_bit)
        assert export_to(tmp_path, llama, "merged") == 1
    monkeypatch.undo()
    assert export_to(tmp_path, llama, "merged") == 0
    assert export_to(tmp_path, adapter, "merged", dtype="float32") == 0
    assert list_names(tmp_path) == ["merged"]
    assert read_record(tmp_path / "merged")["model"] == str(adapter)


def raise_error(error):
    def act(folder):
        assert read_record(folder)["status"] == "written"
        with pytest.raises(ValueError, match="was not finished: export"):
            load_pretrained(str(folder), None, 64)
        raise error

    return act


def test_an_export_that_is_interrupted_leaves_nothing(adapter, tmp_path, spoil, capsys):
    spoil(raise_error(KeyboardInterrupt()))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(adapter), "--to", "peft", "merged", "--out", str(out), "--num-tokens", "2"])
    assert ended.value.code == 130
    expected = "dpo-wrapper: the export was interrupted; the same command begins it again.\n"
    assert capsys.readouterr().err.endswith(expected)
    assert list_names(out) == ["peft"]  # which was whole before
    with pytest.raises(SystemExit):
        main(["export", str(adapter), "--to", "merged", "--out", str(tmp_path / "new"), "--num-tokens", "2"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left on device\): make room, or name"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"No space left .*: make room"),
        (
            Exception("No space left on device (os error 28)"),
            r"No space left on device\): make room, or name",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), r"Permission denied\): name another"),
    ],
)
def test_a_folder_that_cannot_be_written_any_more_is_said(error, reason, adapter, tmp_path, spoil):
    assert export_to(tmp_path, adapter, "merged") == 0
    before = read_record(tmp_path / "merged")
    spoil(raise_error(error))
    with pytest.raises(ValueError, match=f"^--out should be a folder that can be written, but .*{reason}"):
        export_to(tmp_path, adapter, "merged")
    assert list_names(tmp_path) == ["merged"] and read_record(tmp_path / "merged") == before


def test_an_export_is_put_back_where_a_signal_came_while_it_was_replaced(llama, tmp_path):
    place = ExportPlace(tmp_path, "merged")
    place.final.mkdir()
    (place.final / "export.json").write_text('{"status": "verified"}')
    with pytest.raises(KeyboardInterrupt), place.open() as folder:
        place.final.rename(place.earlier)
        (folder / "export.json").write_text("{}")
        raise KeyboardInterrupt
    assert list_names(tmp_path) == ["merged"] and read_record(place.final) == {"status": "verified"}
    (tmp_path / UNFINISHED).mkdir()
    place.final.rename(place.earlier)  # and a process that was killed then
    place.check("model")
    assert read_record(place.final) == {"status": "verified"}


def test_other_folders_are_not_overwritten(llama, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^--out should be a folder without merged, .*: name another\.$"):
        export_to(tmp_path, adapter, "peft", "merged")
    assert list_names(tmp_path) == ["merged"] and list_names(tmp_path / "merged") == ["thesis.txt"]
    (tmp_path / "peft").write_text("a file")
    with pytest.raises(ValueError, match=r"^--out should be a folder without peft, "):
        export_to(tmp_path, adapter, "peft")


def test_an_export_does_not_take_the_place_of_its_model(llama, tmp_path):
    assert export_to(tmp_path, llama, "merged") == 0
    with pytest.raises(ValueError, match=f"the export would take the place of {tmp_path / 'merged'}: name"):
        export_to(tmp_path, tmp_path / "merged", "merged")


def test_what_is_refused_is_refused_before_the_model_is_asked(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "compute_outputs", None)
    with pytest.raises(ValueError, match=f"^--to peft needs a model with an adapter, but {llama} has none"):
        export_to(tmp_path / "out", llama, "merged", "peft")
    assert not (tmp_path / "out").exists()


def test_an_export_is_checked_again(adapter, tmp_path, monkeypatch, capsys):
    options = {"check": True}
    with pytest.raises(ValueError, match=r"^--check should be given where an export was verified, but"):
        export_to(tmp_path, adapter, "merged", **options)
    assert export_to(tmp_path, adapter, "peft", "merged") == 0
    monkeypatch.setattr(run.ExportSource, "load", None)  # which is not needed
    capsys.readouterr()
    assert export_to(tmp_path, adapter, "peft", "merged", **options) == 0
    merged = tmp_path / "merged"
    assert f"merged: {merged} is as it was when it was verified (4 files)" in capsys.readouterr().out
    flip_lowest_bit(merged)
    (merged / "more.txt").touch()
    (merged / "byte_tokenizer.json").unlink()
    assert export_to(tmp_path, adapter, "peft", "merged", **options) == 1
    changed = "byte_tokenizer.json, model.safetensors, more.txt are not: do not use it, or export it again"
    assert changed in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"should be an export of other, but it is one of {adapter}: name"):
        export_to(tmp_path, "other", "peft", **options)


def test_an_error_of_a_writer_is_a_difference(llama, tmp_path, spoil, capsys):
    def disagree(folder):
        raise ExportError(f"the file {folder / 'model.gguf'} is wrong.")

    spoil(disagree)
    assert export_to(tmp_path, llama, "merged") == 1
    assert f"merged: the file {tmp_path / 'merged' / 'model.gguf'} is wrong. It" in capsys.readouterr().out


def test_what_a_process_has_left_that_was_killed_is_removed(llama, tmp_path):
    left = tmp_path / UNFINISHED / "merged"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    assert export_to(tmp_path, llama, "merged") == 0
    assert list_names(tmp_path) == ["merged"]


@pytest.mark.slow
def test_a_signal_ends_the_command_in_the_middle(llama, tmp_path):
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(
        "import time; from dpo_wrapper.commands.export import run; from dpo_wrapper.cli import main\n"
        "write = run.WRITERS['merged']\n"
        "run.WRITERS['merged'] = lambda *args: (write(*args), time.sleep(60))\n"
        f"main(['export', {str(llama)!r}, '--to', 'merged', '--out', {str(out)!r}])"
    )
    command = ForkedCommand(tmp_path / "printed", tmp_path, script)
    while not (out / UNFINISHED / "merged" / "config.json").exists():
        assert command.process.is_running(), command.errors
        time.sleep(0.01)
    command.process.terminate()
    assert command.status == 128 + signal.SIGTERM and not out.exists()
    assert command.errors.endswith("the export was interrupted; the same command begins it again.\n")
