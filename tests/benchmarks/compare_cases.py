"""What `compare_checkouts.py` computes: values and gradients of everything public, in groups of named cases.

Names and keywords are looked up, so that the cases run on checkouts from before and after a renaming.
"""

import importlib
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from compare_functions import log_probs, training
from compare_inputs import (
    PADDINGS,
    Cases,
    Tensors,
    call,
    find,
    gradients,
    make_lists,
    make_pairs,
    method,
    perturb,
)
from compare_models import MODELS
from torch import Tensor

OPTIONS = [(share, impl) for share in (True, "auto", False) for impl in ("auto", "chunked", "eager")]


def make_dpo(model: str = "xt-rotary", **options: Any) -> Any:
    policy = MODELS[model](0)
    dpo = call(find("DPO"), policy, **options)
    perturb(policy)
    return dpo


def step(dpo: Any, *args: Any, **kwargs: Any) -> Tensors:
    """Loss, metrics and gradients of one call."""
    dpo.zero_grad(set_to_none=True)
    loss, metrics = dpo(*args, return_metrics=True, **kwargs)
    loss.backward()
    return {"loss": loss, "grad": gradients(*trained(dpo)), **metrics}


def trained(dpo: Any) -> list[Tensor]:
    return [p for p in dpo.policy_model.parameters() if p.requires_grad]


# what is compared: each group yields a name and a function that returns tensors


def models() -> Cases:
    for name in MODELS:
        for padding in PADDINGS:
            for share, impl in OPTIONS:
                if share is True and name.startswith("plain"):
                    continue  # refused: the attention of a plain module cannot be reached
                settings = dict(share_prefix=share, log_prob_impl=impl)
                yield (
                    f"{name} {padding} {share} {impl}",
                    lambda n=name, p=padding, s=settings: step(make_dpo(n, **s), **make_pairs(p)),
                )
            yield f"{name} {padding} sequence_log_probs", lambda n=name, p=padding: sequence_sums(n, p)


def sequence_sums(name: str, padding: str) -> Tensors:
    pairs = make_pairs(padding)
    real, prompt = pairs["seq_mask"][0], pairs["prompt_mask"][0]
    model = MODELS[name](0).eval()
    return {"sums": find("sequence_log_probs")(model, pairs["preferred_seq"], real & ~prompt, real)}


def make_losses() -> Iterator[tuple[str, Any]]:
    """Every loss of pairs with its defaults, and with each divergence that it takes."""
    package = importlib.import_module("dpo_wrapper.losses")
    for name, cls in sorted(vars(package).items()):
        is_loss = isinstance(cls, type) and hasattr(cls, "needs_reference") and not inspect.isabstract(cls)
        if not is_loss or name in ("KTO", "PlackettLuce", "Loss", "PairLoss", "Objective"):
            continue
        yield name, lambda cls=cls: cls()
        if "divergence" in inspect.signature(cls).parameters:
            for other in ("ForwardKL", "JensenShannon", "AlphaDivergence"):
                yield (
                    f"{name} {other}",
                    lambda cls=cls, other=other: cls(divergence=find(f"losses.{other}")()),
                )


def losses() -> Cases:
    for name, make in make_losses():
        yield name, lambda make=make: step(make_dpo(loss=make()), **make_pairs())
        for dtype in (torch.float32, torch.float64):
            yield f"{name} alone {dtype}", lambda make=make, dtype=dtype: loss_alone(make(), dtype)
    terms = lambda: [(find("losses.Sigmoid")(), 1.0), (find("losses.SFT")(), 0.5)]  # noqa: E731
    yield "combined", lambda: step(make_dpo(loss=terms()), **make_pairs())
    yield "function", lambda: step(make_dpo(loss=lambda p: (p.chosen - p.rejected).exp()), **make_pairs())
    for reference in (True, False):
        yield f"dpo_loss {reference}", lambda reference=reference: functional_loss(reference)


def loss_alone(loss: Any, dtype: torch.dtype) -> Tensors:
    """One value per pair from log-probs between 0 and -10,000."""
    generator = torch.Generator().manual_seed(3)
    scales = torch.tensor([0.0, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0], dtype=dtype)
    sides = [(-torch.rand(7, 7, generator=generator, dtype=dtype) * scales).flatten() for _ in range(4)]
    chosen, rejected = sides[0].requires_grad_(), sides[1].requires_grad_()
    lengths = torch.randint(1, 50, (2, 49), generator=generator)
    mean = lengths[0].to(dtype).mean()
    data = find("PairLogProbs")(chosen, rejected, sides[2], sides[3], lengths[0], lengths[1], mean)
    values = loss(data)
    values.sum().backward()
    return {"values": values, "grad": gradients(chosen, rejected)}


def functional_loss(reference: bool) -> Tensors:
    sides = [-torch.rand(4, 6, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    names = ("ref_chosen_logprobs", "ref_rejected_logprobs")
    given = dict(zip(names, sides[2:], strict=True)) if reference else {}
    chosen, rejected = sides[0].requires_grad_(), sides[1].requires_grad_()
    loss = find("dpo_loss")(chosen, rejected, 0.3, **given)
    loss.backward()
    return {"loss": loss, "grad": gradients(chosen, rejected)}


def options() -> Cases:
    """What else a call or a module may be given."""
    numbers = torch.tensor([0.5, 2.0, 0.0, 1.0])
    given = (-torch.arange(4.0) - 20, -torch.arange(4.0) - 25)
    for name in ("xt-rotary", "hf-llama-lora", "plain-gru"):
        for title, settings, inputs in (
            ("pair_weights", {}, dict(pair_weights=numbers)),
            ("margins", {}, dict(margins=numbers)),
            ("ref_log_probs", {}, dict(ref_log_probs=given)),
            ("ld_alpha", dict(ld_alpha=0.5), {}),
            ("ld_alpha 0", dict(ld_alpha=0.0), {}),
            ("wpo", dict(wpo=True), {}),
            ("beta", dict(beta=0.5), {}),
            ("no reference", dict(reference="none", loss=find("losses.SimPO")()), {}),
        ):
            yield (
                f"{name} {title}",
                lambda n=name, s=settings, i=inputs: step(make_dpo(n, **s), **make_pairs(), **i),
            )
        yield f"{name} cached", lambda n=name: several_steps(n, cache_ref_log_probs=True)
        yield (
            f"{name} cached ld_alpha",
            lambda n=name: several_steps(n, cache_ref_log_probs=True, ld_alpha=0.3),
        )
    yield "eval mode", lambda: {"loss": make_dpo().eval()(**make_pairs())}
    yield "bfloat16 reference", lambda: step(make_dpo(reference_dtype=torch.bfloat16), **make_pairs())
    yield "given reference", lambda: step(make_dpo(reference=MODELS["xt-rotary"](9)), **make_pairs())
    yield "BetaDPO steps", lambda: several_steps("xt-rotary", loss=find("losses.BetaDPO")())
    yield "sync", synchronized
    yield "precomputed", precomputed


def several_steps(name: str, **settings: Any) -> Tensors:
    dpo, found = make_dpo(name, **settings), {}
    optimizer = torch.optim.SGD(trained(dpo), lr=0.1)
    for k in range(3):
        found |= {f"{key} {k}": value for key, value in step(dpo, **make_pairs(seed=k % 2)).items()}
        optimizer.step()
    return found


def synchronized() -> Tensors:
    dpo = make_dpo(reference="copy")
    before = step(dpo, **make_pairs())["loss"]
    dpo.sync_reference(0.6)
    return {"before": before, **step(dpo, **make_pairs())}


def precomputed() -> Tensors:
    """A step with a reference whose log-probs were written to files."""
    lists = [[tuple(ids) for ids in make_lists(5, seed)] for seed in (1, 2, 3)]
    model = MODELS["xt-rotary"](4)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compute, example = find("precompute_ref_log_probs"), find("data.TokenizedExample")
            examples = [example(x, (y, z)) for x, y, z in zip(*lists, strict=True)]
            data = find("data.scored_sequences")(examples, 16384)
        except AttributeError:
            compute, pair = find("cache_reference"), find("data.TokenPair")
            data = [pair(*row) for row in zip(*lists, strict=True)]
        cached = compute(data, model, Path(folder) / "reference")
    return step(make_dpo(reference=cached), find("PreferenceBatch").from_lists(*lists))


def batches() -> Cases:
    """Ready batches of each kind, whole and as micro-batches."""
    prompts, weights = make_lists(6, 1), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.5])
    sides = [make_lists(6, seed) for seed in (2, 3, 4)]
    ranked = [list(completions) for completions in zip(*sides, strict=True)]
    ranked[2].pop()
    labels = [True, False, True, True, False, False]
    makers: dict[str, tuple[str, Callable[[slice], Any]]] = {
        "pairs": (
            "Sigmoid",
            lambda k: find("PreferenceBatch").from_lists(prompts[k], sides[0][k], sides[1][k]),
        ),
        "ranked": (
            "PlackettLuce",
            lambda k: find("RankedBatch").from_lists(prompts[k], ranked[k], weights[k]),
        ),
        "unpaired": (
            "KTO",
            lambda k: call(
                find("UnpairedBatch").from_lists, prompts[k], sides[0][k], labels[k], weights=weights[k]
            ),
        ),
    }
    for name, (loss, make) in makers.items():
        for model in ("xt-rotary", "hf-llama-lora", "plain-gru"):
            yield (
                f"{name} {model}",
                lambda m=model, loss=loss, make=make: step(
                    make_dpo(m, loss=find(f"losses.{loss}")()), make(slice(None))
                ),
            )
        yield (
            f"{name} parts",
            lambda loss=loss, make=make: micro_batches(
                make_dpo(loss=find(f"losses.{loss}")()), [make(slice(0, 3)), make(slice(3, 6))]
            ),
        )
    for which in ("all", "best"):
        yield (
            f"ranked as pairs {which}",
            lambda which=which: step(
                make_dpo(), method(makers["ranked"][1](slice(None)), "to_preference_batch", "pairs")(which)
            ),
        )
    yield (
        "BetaDPO parts",
        lambda: micro_batches(
            make_dpo(loss=find("losses.BetaDPO")()),
            [makers["pairs"][1](k) for k in (slice(0, 3), slice(3, 6))],
        ),
    )


def micro_batches(dpo: Any, parts: list[Any]) -> Tensors:
    """Two optimizer steps, each of several micro-batches."""
    counts = [method(part, "step_totals", "counts")() for part in parts]
    totals = [sum(column) for column in zip(*counts, strict=True)]
    found: Tensors = {}
    for k in range(2):
        ready = [attach(dpo, part, parts, totals) for part in parts]
        for j, part in enumerate(ready):
            found |= {f"{key} {k} {j}": value for key, value in step(dpo, part).items()}
        dpo.end_step()
        perturb(dpo.policy_model, seed=k)
    return found


def attach(dpo: Any, part: Any, parts: list[Any], totals: list[int]) -> Any:
    """A micro-batch with the totals of its step and, for KTO, the step's estimate of the KL."""
    if hasattr(part, "mismatched"):
        total, count = torch.stack([dpo(other.mismatched) for other in parts]).sum(dim=0)
        return part.as_part_of(*totals, total / count)
    ready = method(part, "with_step_totals", "as_part_of")(*totals)
    if getattr(part, "needs_kl", False):
        ready = ready.with_kl(torch.stack([dpo.kl_sums(other) for other in parts]).sum(dim=0))
    return ready


GROUPS = {f.__name__: f for f in (models, losses, options, batches, log_probs, training)}
