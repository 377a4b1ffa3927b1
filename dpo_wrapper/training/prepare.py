"""The module of a stage and its optimizer, as the processes of a run share them."""

from typing import Any

from accelerate import Accelerator
from torch import nn

from dpo_wrapper.training.config import TrainConfig
from dpo_wrapper.training.optimizer import create_optimizer
from dpo_wrapper.training.sharding import find_fsdp_plugin, shard_module
from dpo_wrapper.training.stages import Stage


def prepare_stage(stage: Stage, config: TrainConfig, accelerator: Accelerator) -> tuple[nn.Module, Any]:
    """The module on the device of this process, wrapped (by DDP) or sharded, and its optimizer."""
    plugin = find_fsdp_plugin(config)
    if plugin is not None:
        shard_module(stage.module, stage.model, accelerator, plugin)
    optimizer: Any = create_optimizer(stage.module, config, stage.learning_rate, accelerator.device)
    if plugin is not None:
        return stage.module, accelerator.prepare_optimizer(optimizer)
    module, optimizer = accelerator.prepare(stage.module, optimizer)
    return module, optimizer
