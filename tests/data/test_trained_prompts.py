"""The file of the prompts that a model was trained on."""

from hashlib import blake2b

import numpy as np
import pytest

from dpo_wrapper.data import Example, Message
from dpo_wrapper.data.split import prompt_digest
from dpo_wrapper.data.trained_prompts import TRAINED_PROMPTS_FILE, read_trained_prompts, write_trained_prompts

DIGESTS = np.array([0, 5, 2**63, 2**64 - 1], np.uint64)


def test_what_is_written_is_read(tmp_path):
    write_trained_prompts(tmp_path, DIGESTS)
    read = read_trained_prompts(tmp_path)
    assert read is not None and read.dtype == np.uint64 and read.tolist() == DIGESTS.tolist()
    assert [file.name for file in tmp_path.iterdir()] == [TRAINED_PROMPTS_FILE]
    write_trained_prompts(tmp_path, np.arange(10**6, dtype=np.uint64))
    assert (tmp_path / TRAINED_PROMPTS_FILE).stat().st_size < 8 * 10**6 + 200


def test_a_folder_without_the_file_says_nothing(tmp_path):
    assert read_trained_prompts(tmp_path) is None
    assert read_trained_prompts(tmp_path / "some" / "name") is None


@pytest.mark.parametrize("problem", ["cut", "empty", "text", "floats", "table"])
def test_a_damaged_file_is_told(tmp_path, problem):
    file = tmp_path / TRAINED_PROMPTS_FILE
    write_trained_prompts(tmp_path, DIGESTS)
    whole = file.read_bytes()
    if problem in ("floats", "table"):
        np.save(file, DIGESTS.astype(float) if problem == "floats" else DIGESTS[None])
    else:
        file.write_bytes({"cut": whole[:-4], "empty": b"", "text": b"[1, 2]\n"}[problem])
    with pytest.raises(ValueError, match=r"should hold the hashes of the prompts .*: put it back, or remove"):
        read_trained_prompts(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("What is up?", '[{"content": "What is up?", "role": "user"}]'),
        (
            (Message("system", "Brief é"), Message("user", "Up?", {"id": 3})),
            '[{"content": "Brief \\u00e9", "role": "system"}, {"content": "Up?", "role": "user"}]',
        ),
    ],
    ids=["plain", "messages"],
)
def test_hashes_are_those_that_files_of_earlier_runs_hold(prompt, text):
    """They should never change: rows that such a run was trained on would be taken for new ones."""
    expected = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
    assert prompt_digest(Example(prompt, ("a", "b"))) == expected
