"""Whether the weights that a program reads are those that were written, to the bit."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpo_wrapper.commands.export.agreement import ExportError


@dataclass(frozen=True)
class WeightDigests:
    """A hash of each tensor that an export should hold.

    It outlives the model, so that the export and the model need not be in memory at the same time.

    Attributes:
        by_name: hexadecimal, by the names of the model's state.
        dtype: to which floating-point tensors are cast before they are hashed.
    """

    by_name: Mapping[str, str]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "WeightDigests":
        return cls({name: hash_tensor(tensor, dtype) for name, tensor in model.state_dict().items()}, dtype)

    def check(self, model: nn.Module) -> None:
        """ExportError unless a model that was read back holds the same tensors."""
        found = WeightDigests.of(model, self.dtype).by_name
        names = [name for name in {**self.by_name, **found} if self.by_name.get(name) != found.get(name)]
        if names:
            raise ExportError(
                f"the export should hold the model's weights to the bit, but {len(names)} of "
                f"{len(self.by_name)} tensors are others ({names[0]}): do not use it."
            )

    @property
    def note(self) -> str:
        """What `check` has found out if it has raised nothing."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"all {len(self.by_name)} tensors are those of the model in {dtype}, to the bit"


def hash_tensor(tensor: Tensor, dtype: torch.dtype) -> str:
    """128 bits of a hash of a tensor's values and shape, in hexadecimal."""
    values = tensor.detach().cpu()
    if values.is_floating_point():
        values = values.to(dtype)
    digest = hashlib.blake2b(str(tuple(values.shape)).encode(), digest_size=16)
    digest.update(values.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
