"""How often a step on an accelerator waits for it, counted on a device that does not exist."""

import copy
from collections import Counter

import pytest
import torch
from torch import Generator, Tensor

from dpo_wrapper import DPO, PreferenceBatch, RankedBatch, UnpairedBatch
from dpo_wrapper.batches import Batch, SFTBatch
from dpo_wrapper.losses import KTO, PlackettLuce
from dpo_wrapper.metrics import MetricSums
from dpo_wrapper.training.stages import SFTModule
from helpers.device_waits import DEVICE, counted_waits, move_module
from helpers.marks import mark_slow_except
from helpers.models import ZOO


def draw_ids(generator: Generator, n: int) -> list[int]:
    return torch.randint(1, 16, (n,), generator=generator).tolist()


def draw_batch(kind: str, pairs: int = 16) -> Batch:
    """Some pairs share their prompt, and one is not valid."""
    generator = Generator().manual_seed(0)
    prompts = [draw_ids(generator, 5) for _ in range(pairs)]
    prompts[1] = prompts[0]
    chosen, rejected = ([draw_ids(generator, 4 + k % 3) for k in range(pairs)] for _ in range(2))
    rejected[2] = []
    if kind == "ranked":
        return RankedBatch.from_lists(prompts, list(zip(chosen, rejected, strict=True)))
    if kind == "unpaired":
        return UnpairedBatch.from_lists(prompts, chosen, [k % 2 == 0 for k in range(pairs)])
    weights, margins = torch.rand(2, pairs, generator=generator).unbind()
    columns = (weights, margins) if kind == "columns" else (None, None)
    return PreferenceBatch.from_lists(prompts, chosen, rejected, *columns)


OPTIONS = {
    "pairs": {},
    "columns": {},
    "ranked": {"loss": PlackettLuce()},
    "unpaired": {"loss": KTO()},
    "wpo": {"wpo": True},
    "ld_alpha": {"ld_alpha": 0.5},
}


def run_step(kind: str, on_device: bool) -> tuple[Tensor, dict, list[Tensor], list[Counter]]:
    """Loss, metrics and gradients of a step, and what its forward and backward pass waited for."""
    model = ZOO["hf-llama"](0)
    dpo = DPO(model, reference=copy.deepcopy(model), log_prob_impl="chunked", **OPTIONS[kind])
    waits = []
    with counted_waits() as counted:
        if on_device:
            move_module(dpo)
            dpo(draw_batch(kind).to(DEVICE))  # probes the models
        else:
            dpo(draw_batch(kind))
        batch = draw_batch(kind)
        batch.sequences.prebuild_tree(dpo.policy.tree_options)
        if isinstance(batch, UnpairedBatch):
            batch.kl_sequences.prebuild_tree(dpo.policy.tree_options)
        if on_device:
            batch = batch.to(DEVICE)
        counted.clear()
        loss, metrics = dpo(batch, return_metrics=True)
        waits.append(Counter(counted))
        counted.clear()
        loss.backward()
        waits.append(Counter(counted))
        grads = [p.grad for p in model.parameters()]
        return loss.cpu(), {k: v.cpu() for k, v in metrics.items()}, [g.cpu() for g in grads], waits


@pytest.mark.parametrize("kind", mark_slow_except(["pairs", "unpaired"], OPTIONS))
def test_a_step_that_was_laid_out_ahead_does_not_wait(kind: str):
    loss, metrics, grads, (forward, backward) = run_step(kind, on_device=True)
    assert not forward, forward
    # whether the gradient is the predicted one decides what is computed
    assert backward.total() <= 1, backward
    expected_loss, expected_metrics, expected_grads, _ = run_step(kind, on_device=False)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(metrics, expected_metrics)
    for one, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_padded_rows_on_the_device_are_waited_for_once():
    model = ZOO["hf-llama"](0)
    dpo = DPO(model, reference=copy.deepcopy(model), log_prob_impl="chunked")
    generator = Generator().manual_seed(0)
    ids = torch.randint(1, 16, (2, 4, 9), generator=generator)
    prompt = (torch.arange(9) < 3).expand(4, 9)
    real = torch.arange(9) < torch.tensor([[9], [7], [8], [9]])

    def step(device: str | torch.device) -> Tensor:
        sides = [(x.to(device), x.to(device)) for x in (prompt, real)]
        return dpo(PreferenceBatch.from_padded(tuple(ids.to(device)), *sides))

    expected = step("cpu").detach()
    with counted_waits() as waits:
        move_module(dpo)
        step(DEVICE)  # probes the models
        waits.clear()
        loss = step(DEVICE)
        assert waits.total() == 1 + 5, waits  # five copies to the device
        waits.clear()
        loss.backward()
        assert waits.total() <= 1, waits
        torch.testing.assert_close(loss.detach().cpu(), expected)


def test_a_step_of_sft():
    model = ZOO["hf-llama"](0)
    module = SFTModule(model)
    with counted_waits() as waits:
        move_module(module)
        sequences = draw_batch("pairs").sequences
        batch = SFTBatch(sequences, step_denominator=100)
        module(batch.to(DEVICE))
        batch.sequences.prebuild_tree(module.scorer.tree_options)
        batch = batch.to(DEVICE)
        waits.clear()
        module(batch).backward()
        assert waits.total() <= 1, waits


def test_sums_of_metrics_are_one_copy():
    with counted_waits() as waits:
        metrics = {
            "loss": torch.tensor(2.0),
            "pairs/valid": torch.tensor(3.0),
            "kl/chosen": torch.tensor(1.0),
        }
        metrics = {name: value.to(DEVICE) for name, value in metrics.items()}
        sums = MetricSums()
        waits.clear()
        sums.add(metrics)
        assert waits.total() == 1
    assert sums.result() == {"loss": 2.0, "pairs/valid": 3.0, "kl/chosen": 1.0}


def test_the_device_counts():
    with counted_waits() as waits:
        x = torch.arange(3.0).to(DEVICE, non_blocking=True)
        assert not waits and (x + 1).sum().device == DEVICE and not waits
        for wait in (
            lambda: x.sum().item(), x.tolist, x.cpu, lambda: bool((x > 0).any()), lambda: x[x > 1], x.nonzero,
            x.unique, lambda: torch.tensor([1.0], device=DEVICE), lambda: torch.ones(2).to(DEVICE),
        ):  # fmt: skip
            waits.clear()
            wait()
            assert waits.total() >= 1
