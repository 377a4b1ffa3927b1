import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models: a second thread costs more than it does, the more so where tests run side by side."""
    torch.set_num_threads(1)
