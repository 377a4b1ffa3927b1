from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=("cpu", pytest.param("cuda", marks=pytest.mark.cuda)))
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="session")
def no_silent_fallback() -> Iterator[None]:
    """A function that torch has compiled too often runs uncompiled from then on: here that is an error."""
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield
