"""Output heads that lie in parts on several processes."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def whole(weight: Tensor) -> Tensor:
    """A weight that is sharded (FSDP2's DTensor) gathered, once; its gradient goes back sharded, as the mean
    over processes, which is what FSDP2 makes of the gradients of all weights."""
    if type(weight) in (Tensor, torch.nn.Parameter):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if isinstance(weight, DTensor):
        return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
    return weight


def first_word(weight: Tensor, group: ProcessGroup) -> tuple[int, int]:
    """Where this process's part of the vocabulary begins, and how large the whole is."""
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    sizes = torch.zeros(world, dtype=torch.long, device=weight.device)
    sizes[rank] = len(weight)
    torch.distributed.all_reduce(sizes, group=group)
    return int(sizes[:rank].sum()), int(sizes.sum())
