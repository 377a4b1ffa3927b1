"""Products of narrow matrices that are added to float32 ones, as CUDA can, on the CPU."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from dpo_wrapper import cpu_matmul


@pytest.fixture
def wide_addmm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """torch's CUDA operation that adds a narrow product to a float32 matrix, on the CPU; the betas it got."""
    betas = []

    def addmm(self, mat1, mat2, out_dtype, *, beta=1, alpha=1, out):
        assert out_dtype == out.dtype == self.dtype == torch.float32 and mat1.dtype == mat2.dtype
        betas.append(beta)
        product = alpha * (mat1.float() @ mat2.float())
        return out.copy_(product if beta == 0 else beta * self + product)

    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(cpu_matmul, "can_add_to_float32", lambda device, dtype: True)
    yield betas
    library._destroy()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_narrow_products_are_added_in_float32_where_torch_can(wide_addmm: list[float], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 7), (7, 3)))
    out = torch.randn(5, 3, generator=generator)
    for beta in (1.0, 0.0):
        expected = beta * out.double() + a.double() @ b.double()
        cpu_matmul.add_matmul(out, a, b, beta)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out = torch.full((5, 3), torch.nan)
    cpu_matmul.add_matmul(out, a, b, 0.0)  # memory that was never written
    assert out.isfinite().all() and wide_addmm == [1.0, 0.0, 0.0]


def test_whether_torch_can_is_tried():
    assert not cpu_matmul.can_add_to_float32(torch.device("cpu"), torch.bfloat16)
    for error in (NotImplementedError("no kernel"), RuntimeError("dtypes"), None):
        cpu_matmul.can_add_to_float32.cache_clear()

        def addmm(self, a, b, dtype, beta, out, error=error):
            if error is not None:
                raise error
            return out.add_(a.float() @ b.float())

        def on_cpu(make):
            return lambda *args, device=None, **kwargs: make(*args, **kwargs)

        with (
            patch.object(torch, "eye", on_cpu(torch.eye)),
            patch.object(torch, "full", on_cpu(torch.full)),
            patch.object(torch.ops.aten.addmm, "dtype_out", addmm),
        ):
            can = cpu_matmul.can_add_to_float32(torch.device("cuda", 0), torch.bfloat16)
        assert can == (error is None)
    cpu_matmul.can_add_to_float32.cache_clear()
