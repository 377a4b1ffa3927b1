"""What the scripts of `run.sh` do with a GPU's events, its warnings, and with too little memory."""

import importlib.util
import warnings
import weakref
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The scripts as modules; they find each other and the benchmarks beside them, as when they are run."""
    for folder in (HERE, HERE.parent / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    names = ("gather", "kernels", "profile_step", "train_step", "training_case")
    modules: dict[str, ModuleType] = {name: importlib.import_module(name) for name in names}
    return SimpleNamespace(**modules)


def event(name: str, start: float, end: float) -> Any:
    time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=time_range)


def test_gaps_are_where_no_kernel_runs(scripts):
    # microseconds: a and b overlap, c lies within b, then nothing runs for 30, then d; 20 later e
    kernels = [event("a", 0, 40), event("b", 10, 100), event("c", 50, 60), event("d", 130, 140)]
    busy_ms, gaps = scripts.kernels.find_gaps([*kernels, event("e", 160, 161)])
    assert busy_ms == pytest.approx(0.100 + 0.010 + 0.001)
    assert [(gap["after"], gap["before"]) for gap in gaps] == [("b", "d"), ("d", "e")]
    assert [gap["ms"] for gap in gaps] == pytest.approx([0.030, 0.020])
    assert scripts.kernels.find_gaps([]) == (0.0, [])


def test_kernels_are_counted_per_step(scripts):
    kernels = [event("a", 0, 1000), event("b", 1000, 4000), event("a", 5000, 6000), event("b", 6000, 9000)]
    assert scripts.kernels.count_kernels(kernels, steps=2) == [
        {"name": "b", "ms": 3.0, "count": 1.0, "share": 0.75},
        {"name": "a", "ms": 1.0, "count": 1.0, "share": 0.25},
    ]


def test_kernels_are_added_by_the_first_kind_that_fits(scripts):
    times = {"triton_tem_flex_0": 2, "triton_poi_mul_1": 3, "nvjet_256": 4, "Memcpy DtoH": 5, "reduce": 6}
    kinds = scripts.kernels.add_by_kind([{"name": name, "ms": ms} for name, ms in times.items()])
    others = {"torch's own operations": 6, "copies": 5, "matrix products": 4}
    assert kinds == {"attention": 2, "compiled": 3, **others}


def test_places_that_wait_on_cuda_are_those_of_its_warnings(scripts, monkeypatch):
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with scripts.profile_step.count_places("cuda") as places:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    ((place, _), count), *others = places.items()
    assert count == 2 and not others and modes == ["warn", "default"]
    assert place.startswith("tests/gpu/test_scripts.py:")


def test_a_contestant_without_enough_memory_is_a_result(scripts, monkeypatch):
    cases, train_step = scripts.training_case, scripts.train_step
    setup = cases.set_up(cases.TOY_CASES[0], "cpu")
    build = setup.build_forward

    def build_forward(name: str) -> Any:
        def fail() -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        return fail if name == "plain" else build(name)

    monkeypatch.setattr(setup, "build_forward", build_forward)
    record = train_step.summarize(setup, train_step.measure_case(setup, ["plain", "tree"], runs=1), 1e12)
    assert record["results"]["plain"] == {"failed": "out of memory"}
    tree = record["results"]["tree"]
    assert tree["mfu"] == pytest.approx(sum(record["step_flops"].values()) / tree["seconds"] / 1e12)
    assert all(p.grad is None for p in setup.model.parameters())


def test_lack_of_memory_fails_no_stage_and_other_errors_do(scripts):
    has_failed = scripts.train_step.has_failed
    assert not has_failed({"results": {"tree": {"seconds": 1.0}, "trl": {"failed": "out of memory"}}})
    assert has_failed({"results": {"tree": {"failed": "RuntimeError: no kernel"}}})
    assert has_failed({"failed": "RuntimeError: no kernel"})
    shape_has_failed = scripts.gather.has_failed
    assert not shape_has_failed({"results": {"cce": {"missing": "not installed"}}})
    modes = {"frozen": {"failed": "OutOfMemoryError: 20 GiB"}}
    assert not shape_has_failed({"results": {"compile": {"modes": modes}}})
    assert shape_has_failed({"results": {"triton": {"modes": {"frozen": {"failed": "RuntimeError: no"}}}}})


@pytest.mark.slow
def test_nothing_of_a_case_stays_in_memory(scripts, monkeypatch):
    cases, train_step = scripts.training_case, scripts.train_step
    models = []

    def set_up(*arguments: Any) -> Any:
        setup = cases.set_up(*arguments)
        models.append(weakref.ref(setup.model))
        return setup

    monkeypatch.setattr(train_step, "set_up", set_up)
    names = ["tree", "trl"] if importlib.util.find_spec("trl") else ["tree"]
    options = Namespace(device="cpu", only=names, runs=1, peak_flops=1e12)
    for case in cases.TOY_CASES:
        assert not train_step.has_failed(train_step.run_case(case, options))
        cases.free_memory()
    assert [model() for model in models] == [None, None]
