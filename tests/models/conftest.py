import math

import pytest

from dpo_wrapper.prefix_tree import cpu_attention


@pytest.fixture(params=["model", "branches"])
def each_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain attention on the CPU by the model along each path, and by torch's kernel on each branch."""
    monkeypatch.setattr(cpu_attention, "MIN_BRANCH_NUMEL", 0 if request.param == "branches" else math.inf)
