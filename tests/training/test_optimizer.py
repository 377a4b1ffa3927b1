"""The optimizer by name, what decays, and the schedules of the learning rate."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from x_transformers import Decoder, TransformerWrapper

from dpo_wrapper.training.optimizer import create_optimizer, create_schedule, find_decayed, find_optimizer
from dpo_wrapper.training.options.optimization import OptimizationOptions
from dpo_wrapper.training.setup import set_up_training
from dpo_wrapper.training.train import train
from helpers.runs import interrupt_training, make_config, read_metrics

CPU = torch.device("cpu")


def rates(num_steps=20, **options):
    rate_of_step = create_schedule(OptimizationOptions(**options), 1e-3, num_steps)
    return [rate_of_step(step) for step in range(1, num_steps + 1)]


def test_the_learning_rate_rises_and_falls():
    cosine = rates()
    assert cosine[:3] == [5e-4, 1e-3, 1e-3]  # two steps of warm-up; the fall begins at the peak
    assert all(a > b for a, b in pairwise(cosine[2:])) and 0 < cosine[-1] < 2e-5


def test_schedules_have_the_shapes_that_their_names_say():
    assert rates(lr_scheduler="constant") == [1e-3] * 20
    assert rates(lr_scheduler="constant_with_warmup") == [5e-4, *[1e-3] * 19]
    linear = rates(lr_scheduler="linear")
    assert linear[2:] == pytest.approx([1e-3 * left / 18 for left in range(18, 0, -1)])
    assert linear == pytest.approx(rates(lr_scheduler="polynomial", lr_scheduler_args='{"lr_end": 0.0}'))
    low = rates(1000, lr_scheduler="cosine_with_min_lr", lr_scheduler_args='{"min_lr_rate": 0.1}')
    assert low[-1] == pytest.approx(1e-4, rel=1e-3) and max(low) == 1e-3
    stable = rates(lr_scheduler="warmup_stable_decay", lr_scheduler_args='{"num_decay_steps": 5}')
    assert stable[1:16] == [1e-3] * 15 and stable[-1] < 5e-4
    assert rates(1, lr_scheduler="polynomial") == [1e-3]  # the warm-up takes all of a run of one step


def test_weights_decay_and_biases_and_norms_do_not():
    norms = {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True}  # these have a scale for each head
    decoder = Decoder(dim=8, depth=1, heads=2, use_rmsnorm=True, **norms)
    model = TransformerWrapper(num_tokens=16, max_seq_len=8, attn_layers=decoder)
    decayed = find_decayed(model)
    names = {name: decayed[p] for name, p in model.named_parameters()}
    assert names["token_emb.emb.weight"] and names["to_logits.weight"]
    assert not any(is_decayed for name, is_decayed in names.items() if name.endswith(("bias", "scale")))
    assert {p.ndim for name, p in model.named_parameters() if not names[name]} == {1, 3}
    optimizer = create_optimizer(model, OptimizationOptions(weight_decay=0.1), 1e-3, CPU)
    by_decay = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert {id(p) for p in by_decay[0.1]} == {id(p) for p, is_decayed in decayed.items() if is_decayed}
    assert len(by_decay[0.1]) + len(by_decay[0.0]) == len(decayed)


def test_adamw_is_fused_where_torch_has_that():
    layer = nn.Linear(2, 2)
    assert create_optimizer(layer, OptimizationOptions(), 1e-3, CPU).defaults["fused"]
    assert not create_optimizer(layer, OptimizationOptions(), 1e-3, torch.device("meta")).defaults["fused"]
    options = OptimizationOptions(optimizer_args='{"fused": false, "betas": [0.8, 0.9]}')
    defaults = create_optimizer(layer, options, 1e-3, CPU).defaults
    assert defaults["betas"] == (0.8, 0.9) and not defaults["fused"]


def test_an_optimizer_is_found_by_its_dotted_name():
    options = OptimizationOptions(optimizer="torch.optim.SGD", optimizer_args='{"momentum": 0.5}')
    optimizer = create_optimizer(nn.Linear(2, 2), options, 0.25, CPU)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == 0.5 and optimizer.defaults["lr"] == 0.25


class TwoFacedOptimizer(torch.optim.SGD):
    def eval(self):
        pass


@pytest.mark.parametrize(
    "name, error, match",
    [
        ("adam", ValueError, "adam is none: take one like torch.optim.SGD"),
        ("torch.optim.AdamV", ValueError, "torch.optim.AdamV is none"),
        ("torch.nn.Linear", ValueError, "is no torch.optim.Optimizer"),
        (
            "no_such_library.AdamV",
            ImportError,
            r"cannot be imported \(No module .*: pip install no_such_library",
        ),
        ("torch.optim.LBFGS", ValueError, "several times a step"),
        (f"{__name__}.TwoFacedOptimizer", ValueError, "trains other weights than it evaluates"),
    ],
)
def test_names_of_no_optimizer_are_refused(name, error, match):
    with pytest.raises(error, match=match):
        find_optimizer(name)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"optimizer_args": '{"betaz": [0.9, 0.95]}'}, r"adamw should take its options .* 'betaz'"),
        ({"optimizer_args": '{"eps": -1}'}, r"refuses them \(Invalid epsilon value"),
        (
            {"optimizer": "torch.optim.Rprop", "weight_decay": 0.1},
            "but it has none: leave --weight-decay out",
        ),
        ({"optimizer": "torch.optim.Muon"}, r"refuses them \(Muon only supports 2D parameters"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        create_optimizer(nn.Linear(2, 2), OptimizationOptions(**options), 1e-3, CPU)


def test_what_a_schedule_does_not_take_is_refused():
    with pytest.raises(ValueError, match="warmup_stable_decay should take its options"):
        rates(lr_scheduler="warmup_stable_decay")
    with pytest.raises(ValueError, match=r"cosine should take its options, .* 'min_lr'"):
        rates(lr_scheduler_args='{"min_lr": 0.1}')
    with pytest.raises(ValueError, match="constant has none: leave it out"):
        OptimizationOptions(lr_scheduler="constant", lr_scheduler_args="{}")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"optimizer_args": "[0.9]"}, "--optimizer-args should be the JSON of an object"),
        ({"optimizer_args": "betas"}, "--optimizer-args should be the JSON of an object"),
        ({"optimizer_args": '{"lr": 1}'}, "should not hold lr, but it does: give --learning-rate"),
        ({"max_steps": 0}, "--max-steps should be at least 1"),
        ({"lr_scheduler": "constant", "warmup_ratio": 0.2}, "constant has no warm-up"),
    ],
)
def test_options_that_cannot_be_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        OptimizationOptions(**options)


def test_float16_needs_cuda(rows, tmp_path):
    with pytest.raises(ValueError, match="fp16 should run on CUDA, but this run does not"):
        set_up_training(make_config(rows, tmp_path / "out", precision="fp16"))


@pytest.mark.slow
def test_a_run_with_another_optimizer_and_schedule_resumes_to_the_same_result(rows, tmp_path):
    options = {
        "optimizer": "torch.optim.Adafactor",
        "optimizer_args": json.dumps({"d": 2.0}),
        "lr_scheduler": "linear",
        "max_steps": 4,
        "save_steps": 2,
        "sft_epochs": 0,
    }
    train(make_config(rows, tmp_path / "whole", **options))
    with interrupt_training("dpo", after_steps=3):
        train(make_config(rows, tmp_path / "out", **options))
    train(make_config(rows, tmp_path / "out", resume=True, **options))
    records = read_metrics(tmp_path / "whole")
    assert read_metrics(tmp_path / "out") == records
    rates = [record["lr"] for record in records if record["part"] == "step"]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4 * 2 / 3, 1e-4 / 3])
