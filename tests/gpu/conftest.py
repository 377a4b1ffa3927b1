import pytest


@pytest.fixture(params=("cpu", pytest.param("cuda", marks=pytest.mark.cuda)))
def device(request: pytest.FixtureRequest) -> str:
    return request.param
