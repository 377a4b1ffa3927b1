import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers import models
from helpers.curves import unrendered_curves
from helpers.runs import BUNDLED, QUICK, SMALL_DECODER, make_config, short_samples

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a machine may be busy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `cuda` where there is no such device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_unconfigure() -> None:
    """At its exit, a library tells what of it is still frozen as leaked."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `-n`, neighbours run in one process, which makes their fixtures once, until another is idle."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models: a second thread costs more than it does, the more so where tests run side by side.

    Processes that tests start have one thread as well.
    """
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="module")
def freeze_libraries() -> None:
    """Collections of garbage, of which each run makes several, no more look at what is loaded by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_sigterm_handler() -> Iterator[None]:
    """A command that a test runs in this process may set another, or ignore the signal at its end."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True, scope="session")
def quick_runs() -> Iterator[None]:
    with unrendered_curves(), short_samples():
        yield


@pytest.fixture(autouse=True, scope="session")
def no_silent_fallback() -> Iterator[None]:
    """A function that torch has compiled too often runs uncompiled from then on: on CUDA that is an error."""
    if not torch.cuda.is_available() or not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"):
        yield  # torch before 2.7 knows the limit by another name
        return
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(params=("cpu", pytest.param("cuda", marks=pytest.mark.cuda)))
def device(request: pytest.FixtureRequest) -> str:
    """Where a test runs: on the CPU, and, if there is one, on a GPU."""
    return request.param


@pytest.fixture(params=("eager", "cached", "recomputed"))
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of the log-prob gather: the slow lines, or tiles whose softmaxes are cached or computed again."""
    from helpers.log_prob_inputs import softmax_caching

    with softmax_caching(request.param == "cached"):
        yield "eager" if request.param == "eager" else "chunked"


@pytest.fixture(params=("cached", "recomputed"))
def tiled_impl(request: pytest.FixtureRequest) -> Iterator[str]:
    from helpers.log_prob_inputs import softmax_caching

    with softmax_caching(request.param == "cached"):
        yield "chunked"


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of the zoo have one layer: tracing what is compiled takes a second or two for each."""
    monkeypatch.setattr(models, "DEPTH", 1)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """The first rows of the bundled data: 21 to train on and some that are held out."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = BUNDLED.read_text(encoding="utf-8").splitlines()[:26]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama in a folder."""
    pytest.importorskip("transformers")
    from helpers.lora_runs import save_llama

    return save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def lora_run(rows, tmp_path_factory, llama):
    """A run that has trained an adapter of the Llama."""
    pytest.importorskip("peft")
    from dpo_wrapper.training.train import train
    from helpers.lora_runs import make_lora_config

    out = tmp_path_factory.mktemp("runs") / "lora"
    train(make_lora_config(rows, out, llama, **QUICK))
    return out


@pytest.fixture(scope="session")
def staged_run(rows, tmp_path_factory):
    """A new decoder after supervised training and preference training."""
    from dpo_wrapper.pretrained import PRESETS
    from dpo_wrapper.training.train import train

    out = tmp_path_factory.mktemp("runs") / "staged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        train(make_config(rows, out, **QUICK, loss="simpo", learning_rate=1e-2))
    return out
