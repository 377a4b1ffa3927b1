"""Weights that policy and reference share: a reference stays where it is only while nobody writes them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.models.adapters import LORA_FACTOR, is_adapted, is_merged, mergeable_parameters

WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What wrappers that come later put into the names of parameters."""


class SharedWeights:
    """The weights that policy and reference share, and checksums by which a change of them is seen.

    They are parameters, and buffers that are saved.

    Parameters of adapted layers are read before each pass of the reference, since merging an adapter writes
    them in a way that autograd does not count; others only where autograd has counted a write.

    Attributes:
        names: of each shared weight its name in the policy and in the reference.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module) -> None:
        self.policy, self.reference = policy, reference
        mergeable = mergeable_parameters(policy)
        if policy is reference:  # with its adapter off: all that is no factor of the adapter
            shared = {n: p for n, p in weights_by_name(policy).items() if not LORA_FACTOR.search(n)}
            self.names = {name: name for name in shared}
        else:
            keys = {memory_key(p): name for name, p in weights_by_name(reference).items()}
            shared = {name: p for name, p in weights_by_name(policy).items() if memory_key(p) in keys}
            self.names = {name: keys[memory_key(p)] for name, p in shared.items()}
        self.mergeable = {self.names[name] for name, p in shared.items() if id(p) in mergeable}
        self.had_adapter = any(map(is_adapted, policy.modules()))
        self.remember()

    def remember(self) -> None:
        """Take the weights as they are now for those of the reference."""
        self.versions: dict[str, Any] = {}
        self.checksums: dict[Any, int] = {}
        self.find_written(weights_by_name(self.reference))

    def check(self) -> None:
        """ValueError if a shared weight trains, or is or was written."""
        if not self.names:
            return
        policy = weights_by_name(self.policy)
        for name in self.names:
            if name in policy and policy[name].requires_grad:
                raise ValueError(
                    f"{name} was frozen when DPO was made, so policy and reference share it, but now it "
                    "trains: choose what trains before making DPO."
                )
        if is_merged(self.policy):
            raise ValueError(
                "the policy's adapter should be apart from weights that the reference shares, but it is "
                "merged into them: call unmerge_adapter() first."
            )
        has_adapter = any(map(is_adapted, self.policy.modules()))
        if self.policy is self.reference and self.had_adapter and not has_adapter:
            raise ValueError(
                "the policy should keep the adapter that it had when DPO was made, but it was unloaded: make "
                "a new DPO."
            )
        reference = policy if self.policy is self.reference else weights_by_name(self.reference)
        if (written := self.find_written(reference)) is not None:
            raise ValueError(
                f"{written} should stay as it was when DPO was made, since policy and reference share it, "
                "but it was written (merging and unmerging an adapter rounds): make DPO with reference = "
                "'copy' and a reference_dtype, whose copy shares nothing."
            )

    def find_written(self, weights: Mapping[str, Tensor]) -> str | None:
        """Which of the reference's weights differs from what it was when it was first seen in its form."""
        read = {}
        for name in self.names.values():
            local = local_tensor(weights.get(name))
            if local is not None:
                version = (id(weights[name]), local.data_ptr(), tensor_version(local))
                if name in self.mergeable or self.versions.get(name) != version:
                    read[name] = local
                self.versions[name] = version
        written = []
        for (name, local), checksum in zip(read.items(), compute_checksums(list(read.values())), strict=True):
            form = (name, local.dtype, local.numel())  # another after a cast, and in another process's shard
            if self.checksums.setdefault(form, checksum) != checksum:
                del self.versions[name]  # read it again next time
                written.append(name)
        return written[0] if written else None


def weights_by_name(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers of floats, by the names that they had before wrappers came between."""
    weights = (*model.named_parameters(), *saved_buffers(model))
    return {WRAPPERS.sub("", name): weight for name, weight in weights}


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of floats that a state dict holds, such as the biases of a router, by name."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            is_saved = buffer is not None and name not in module._non_persistent_buffers_set
            if is_saved and buffer.is_floating_point():
                yield f"{prefix}.{name}".lstrip("."), buffer


def memory_key(parameter: Tensor) -> tuple[str, int]:
    """The same for weights that lie in the same memory, be they one object or two."""
    local = local_tensor(parameter)
    address = 0 if local is None else local.data_ptr()
    return (str(parameter.device), address) if address else ("object", id(parameter))


def local_tensor(parameter: Any) -> Tensor | None:
    """What this process holds of a parameter; None if it holds no numbers that can be read as bits."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    is_plain = type(local) in (Tensor, nn.Parameter)
    return local.detach() if is_plain and not local.is_meta else None


def tensor_version(tensor: Tensor) -> int | None:
    """How often autograd has seen a tensor written; None where it does not count."""
    return None if tensor.is_inference() else tensor._version


@torch.no_grad()
def compute_checksums(tensors: list[Tensor]) -> list[int]:
    """For each tensor the sum of its bits, taken as integers of 64: another one if a value changes."""
    sums = []
    for tensor in tensors:
        data = tensor.contiguous().view(-1).view(torch.uint8)
        data = data.clone() if data.storage_offset() % 8 else data
        count = len(data) // 8 * 8
        sums.append(data[:count].view(torch.int64).sum() + data[count:].sum())
    return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []
