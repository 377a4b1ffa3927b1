"""FSDP2: the weights, gradients and optimizer states of a stage are spread over the processes."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch import Tensor, nn

from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.models import language_model
from dpo_wrapper.models.wrappers import wrapper_kind
from dpo_wrapper.reference.sharding import gather_tensor, is_sharded_tensor
from dpo_wrapper.training.config import TrainConfig, flag
from dpo_wrapper.training.processes import join_processes
from dpo_wrapper.training.stages import Stage
from dpo_wrapper.training.stopping import TrainingError

T = TypeVar("T")


def find_fsdp_plugin(config: TrainConfig) -> FullyShardedDataParallelPlugin | None:
    """How weights are sharded, by --fsdp or accelerate's configuration; None where they are not.

    Raises:
        ValueError: there is one process alone, or the configuration asks for what cannot be.
        ImportError: accelerate is too old.
    """
    is_configured = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if not (config.fsdp or is_configured):
        return None
    if not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"):
        raise ImportError("weights are sharded with accelerate 1.6 or newer: pip install -U accelerate.")
    if join_processes(config).num_processes == 1:
        raise ValueError(
            "weights should be sharded over several processes, but there is one: start them by torchrun "
            "--nproc-per-node N or accelerate launch, or leave --fsdp out."
        )
    plugin = FullyShardedDataParallelPlugin(fsdp_version=None if is_configured else 2)
    if plugin.fsdp_version != 2:
        raise ValueError(
            "accelerate's configuration should shard by FSDP2, but its fsdp_version is "
            f"{plugin.fsdp_version}: write fsdp_version: 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "accelerate's configuration should have each process load the model, of which it makes the "
            "reference, but fsdp_cpu_ram_efficient_loading is true: write false."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "accelerate's configuration should leave activations alone, but fsdp_activation_checkpointing is "
            "true: write false, and give --gradient-checkpointing."
        )
    for name in ("reference_device", "load_in_4bit"):
        if getattr(config, name):
            raise ValueError(
                f"{flag(name)} should be left out where weights are sharded, for all of them are on the "
                "device of each process and in a dtype of floats: leave it out."
            )
    return plugin


def shard_module(
    module: nn.Module, model: nn.Module, accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin
) -> None:
    """Spread the weights of policy and reference over all processes, in place.

    The weights of a layer are gathered when it is called; what is outside of layers (embeddings, norms, the
    output head) when the module is. Computation under autocast is that of one process.

    Args:
        module: that of a stage.
        model: the policy in it.
        plugin: names the classes of layers, or else the model's family does.

    Raises:
        TrainingError: a parameter cannot be sharded, or the model has no such layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for name, p in module.named_parameters():
        if not p.ndim:
            raise TrainingError(
                f"parameters should have a dimension along which they are sharded, but {name} is a single "
                "number: train without --fsdp."
            )
    reference = getattr(module, "ref_model", None)
    if reference is not None:
        unshare_weights(reference, model)
    names = plugin.transformer_cls_names_to_wrap
    layers = [layer for one in (model, reference) if one is not None for layer in find_layers(one, names)]
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options: Any = {"mesh": mesh, "offload_policy": plugin.cpu_offload}
    for layer in reversed(layers):  # the innermost first
        fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **options)
    root: Any = module
    if accelerator.native_amp:
        root.forward = accelerator.autocast()(root.forward)
    root.call_function = lambda function: function()
    fully_shard(root, **options)
    for name in ("call_function", "normalize_over_step"):
        if hasattr(root, name):
            register_fsdp_forward_method(root, name)


def unshare_weights(reference: nn.Module, policy: nn.Module) -> None:
    """Give a reference parameters of its own where it shares frozen ones: FSDP gathers them separately."""
    shared = {id(p) for p in policy.parameters()}
    own: dict[int, nn.Parameter] = {}
    for module in reference.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in shared:
                own.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=False))
                module._parameters[name] = own[id(p)]


def find_layers(model: nn.Module, names: list[str] | None) -> list[nn.Module]:
    """The modules of some classes, or else those that the model's family names, the outermost first."""
    if names is None:
        chosen = {id(layer) for layer in language_model(model).layers_to_shard()}
        return [module for module in model.modules() if id(module) in chosen]
    unknown = set(names) - {type(module).__name__ for module in model.modules()}
    if unknown:
        raise TrainingError(
            "fsdp_transformer_layer_cls_to_wrap should name classes of modules of the model, but "
            f"{min(unknown)} is none: correct it, or leave it out."
        )
    return [module for module in model.modules() if type(module).__name__ in names]


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether FSDP gathers weights when a module is called: that of a stage, and each layer in it."""
    module_class: Any = type(module)
    return wrapper_kind(module_class) == "sharded"


def call_gathered(module: nn.Module, function: Callable[[], T]) -> T:
    """Call a function that runs the model of a stage otherwise than by the module's forward."""
    sharded: Any = module
    if not is_fsdp_module(module):
        return function()
    result = sharded.call_function(function)
    reshard(module)
    return result


def reshard(module: nn.Module) -> None:
    """Free the weights that are still gathered, so that all parameters are sharded ones."""
    sharded: Any
    for sharded in module.modules():
        if is_fsdp_module(sharded):
            sharded.reshard()


def shard_like(value: Tensor, target: Any) -> Tensor:
    """A whole tensor that every process has, sharded as a target is, if it is."""
    if is_sharded_tensor(value) or not is_sharded_tensor(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@contextmanager
def whole_weights(model: nn.Module, is_needed: bool, names: Collection[str] | None = None) -> Iterator[None]:
    """Inside this context the parameters of a model are whole ones on the CPU, where `is_needed`.

    All processes take part; where nothing is sharded, nothing happens.

    Args:
        names: of the parameters; by default all.
    """
    whole: dict[int, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, p in list(model.named_parameters(remove_duplicate=False)):
        if is_sharded_tensor(p) and (names is None or path in names):
            if id(p) not in whole:
                gathered = gather_tensor(p.detach())
                whole[id(p)] = p
                if is_needed:  # a copy, for the gathered tensor is a part of a padded one
                    copy = torch.empty_like(gathered, device="cpu").copy_(gathered)
                    whole[id(p)] = nn.Parameter(copy, p.requires_grad)
            parent, _, name = path.rpartition(".")
            replaced.append((model.get_submodule(parent), name, p))
    for module, name, p in replaced:
        module._parameters[name] = whole[id(p)]
    try:
        yield
    finally:
        for module, name, p in replaced:
            module._parameters[name] = p


def equalize_batches(
    accelerator: Accelerator, stage: Stage, batches: list[Any], examples: Sequence[TokenizedExample]
) -> list[Any]:
    """The micro-batches of this process, as many as of any other where each pass of a model takes them all.

    Those that are added have no scored tokens, so that they count nowhere.
    """
    if not is_fsdp_module(stage.module):
        return batches
    numbers = accelerator.gather(torch.tensor([len(batches)], device=accelerator.device))
    num_missing = int(numbers.max()) - len(batches)
    return [*batches, *([stage.collate_fn([leave_unscored(examples[0])])] * num_missing)]


def leave_unscored(example: TokenizedExample) -> TokenizedExample:
    """The same example without a scored token."""
    lengths = [len(example.prompt) + len(completion) for completion in example.completions]
    return replace(example, scored=tuple((False,) * length for length in lengths), kl_completion=())
