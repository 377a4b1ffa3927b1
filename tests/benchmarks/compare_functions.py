"""The cases of `compare_checkouts.py` for log-probs from hidden states and for training runs."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from compare_inputs import Cases, Tensors, call, find, gradients

DATA = Path("examples/data/preferences.jsonl")


def log_probs() -> Cases:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for impl in ("auto", "chunked", "eager"):
            for title, settings in (
                ("plain", {}),
                ("bias", dict(bias=True)),
                ("scale", dict(logit_scale=0.5)),
                ("softcap", dict(softcap=5.0, bias=True)),
                ("frozen", dict(frozen=True)),
                ("extras", dict(extras=["entropy", "log_sum_p2", "top1", "greedy"])),
                ("fused", dict(fused=True)),
            ):
                yield (
                    f"{title} {impl} {dtype}",
                    lambda s=settings, i=impl, d=dtype: gather(37, 24, 211, d, i, **s),
                )
        for fused in (True, False):
            yield (
                f"large {fused} {dtype}",
                lambda d=dtype, f=fused: gather(2000, 16, 20000, d, "auto", fused=f),
            )
        yield f"large frozen {dtype}", lambda d=dtype: gather(2000, 16, 20000, d, "auto", frozen=True)
        yield f"from logits {dtype}", lambda d=dtype: from_logits(d)


def gather(
    t: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    impl: str,
    *,
    bias=False,
    frozen=False,
    fused=False,
    **options: Any,
) -> Tensors:
    torch.manual_seed(0)
    hidden, head, offset = torch.randn(t, d), torch.randn(v, d), torch.randn(v)
    inputs = [x.to(dtype).requires_grad_(not frozen or x is hidden) for x in (hidden, head, offset)]
    targets = torch.randint(0, v, (t,))
    weights = torch.linspace(-1, 1, t)
    loss = lambda values: -(values * weights.to(values.dtype)).sum() / t  # noqa: E731
    if fused:
        options["fused_loss"] = find("FusedLoss", "Ahead")(loss, torch.arange(t) // 7)
    found = call(
        find("token_log_probs"), *inputs[:2], targets, bias=inputs[2] if bias else None, impl=impl, **options
    )
    values, extras = found if isinstance(found, tuple) else (found, {})
    loss(values).backward()
    return {"values": values, "grad": gradients(*inputs), **extras}


def from_logits(dtype: torch.dtype) -> Tensors:
    torch.manual_seed(0)
    logits = torch.randn(3, 9, 50).to(dtype).requires_grad_()
    mask = torch.rand(3, 9) < 0.6
    values = find("log_probs.log_probs_from_logits")(logits, torch.randint(0, 50, (3, 9)), mask)
    (values * torch.linspace(0, 1, 9)).sum().backward()
    return {"values": values, "grad": gradients(logits)}


def training() -> Cases:
    for loss in ("sigmoid(beta=0.1) + 1.0*sft", "kto", "plackettluce"):
        yield loss, lambda loss=loss: train(loss)


def train(loss: str) -> Tensors:
    """The records and the final weights of a run of a few steps."""
    config, run = (
        find("training.config.TrainConfig", "config.TrainConfig"),
        find("training.train.train", "train.train"),
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(DATA.read_text().splitlines(keepends=True)[:28]))
        out = Path(folder) / "run"
        run(
            call(
                config,
                data=data,
                out=out,
                loss=loss,
                sft_epochs=1,
                epochs=1,
                batch_size=12,
                max_length=64,
                cpu=True,
                micro_batch_tokens=600,
                save_steps=0,
            )
        )
        from safetensors.torch import load_file

        found = {f"weights {name}": value for name, value in load_file(out / "model.safetensors").items()}
        for k, line in enumerate((out / "metrics.jsonl").read_text().splitlines()):
            for name, value in json.loads(line).items():
                if isinstance(value, float) and "second" not in name and name not in ("lr", "learning_rate"):
                    found[f"record {k} {name}"] = torch.tensor(value, dtype=torch.float64)
    return found
