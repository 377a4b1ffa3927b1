"""Files of safetensors have the mode that the umask gives."""

import os

import pytest
import torch

from dpo_wrapper.libraries.tensor_files import apply_umask
from dpo_wrapper.training.state_files import write_state


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_state(tmp_path / "state.safetensors", {"weight": torch.ones(2)})
        (tmp_path / "other").touch(mode=0o600)
        apply_umask(tmp_path / "other")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {"state.safetensors": mode, "other": mode}
