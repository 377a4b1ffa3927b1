"""Output heads whose vocabulary is divided among processes."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def full_weight(weight: Tensor) -> Tensor:
    """Gather a weight that FSDP2 has sharded (a DTensor); other weights are returned as they are.

    Its gradient is sharded again as the mean over processes, as FSDP2 does with all gradients.
    """
    if type(weight) in (Tensor, torch.nn.Parameter):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    if isinstance(weight, DTensor):
        return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
    return weight


def vocab_offset(weight: Tensor, group: ProcessGroup | None) -> tuple[int, int]:
    """Where this process's slice of the vocabulary begins, and the size of the whole vocabulary."""
    if group is None:
        return 0, len(weight)
    rank, world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    sizes = torch.zeros(world_size, dtype=torch.long, device=weight.device)
    sizes[rank] = len(weight)
    torch.distributed.all_reduce(sizes, group=group)
    known_sizes = sizes.tolist()
    return sum(known_sizes[:rank]), sum(known_sizes)
