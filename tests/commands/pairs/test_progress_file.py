"""Finished work is read again after a kill at any moment, and not with other settings."""

import subprocess
import sys

import pytest

from dpo_wrapper.commands.pairs.progress_file import ProgressFile, read_settings

SETTINGS = {"seed": 1, "logs": [{"name": "a"}]}
RECORDS = [{"batch": 0, "samples": ["é\u2028"]}, {"batch": 1, "samples": []}]


@pytest.fixture
def written(tmp_path):
    """A file with two records."""
    with ProgressFile(tmp_path / "p", SETTINGS) as file:
        for record in RECORDS:
            file.append(record)
    return file.path


def test_a_file_that_is_cut_anywhere_goes_on_with_what_is_whole(written):
    content = written.read_bytes()
    ends = [k + 1 for k, byte in enumerate(content) if byte == ord("\n")]
    for length in sorted({*range(0, len(content), 19), *ends}):
        written.write_bytes(content[:length])
        num_whole = sum(length >= end for end in ends)  # the first line holds the settings
        with ProgressFile(written, SETTINGS) as file:
            assert file.records == RECORDS[: max(0, num_whole - 1)]
            for record in RECORDS[len(file.records) :]:
                file.append(record)
        assert written.read_bytes() == content


def test_other_settings_are_refused_and_change_nothing(written):
    content = written.read_bytes()
    with pytest.raises(ValueError, match=r"the same settings, but seed was 1 and is 2: repeat .* or delete"):
        ProgressFile(written, SETTINGS | {"seed": 2})
    with pytest.raises(ValueError, match="but logs are not what they were: repeat"):
        ProgressFile(written, SETTINGS | {"logs": []})
    assert written.read_bytes() == content


def test_a_file_without_records_takes_other_settings(written, tmp_path):
    lines = written.read_bytes().splitlines(keepends=True)
    assert read_settings(written) == SETTINGS and read_settings(tmp_path / "none") == {}
    for content in (lines[0], lines[0] + lines[1][:9], lines[0][:9]):
        written.write_bytes(content)
        assert read_settings(written) == {}
        with ProgressFile(written, {"seed": 2}) as file:
            assert file.records == []
        assert written.read_bytes() == b'{"settings": {"seed": 2}}\n'


def test_a_second_process_is_refused(written):
    pytest.importorskip("fcntl")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dpo_wrapper.commands.pairs.progress_file import ProgressFile\n"
        f"ProgressFile(Path(sys.argv[1]), {SETTINGS!r})\n"
    )
    with ProgressFile(written, SETTINGS):
        done = subprocess.run([sys.executable, "-c", code, written], capture_output=True, text=True)
    assert done.returncode and "another is writing to it now" in done.stderr
