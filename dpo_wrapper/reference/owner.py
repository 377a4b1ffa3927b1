"""A module that owns a reference beside its policy, and moves and copies the two rightly."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dpo_wrapper.reference.frozen_copy import copy_with_closures
from dpo_wrapper.reference.reference import FrozenModel, Reference


class ReferenceOwner(nn.Module):
    """A module with the attributes `reference` and `ref_model`, the reference's own module or None."""

    reference: Reference
    ref_model: nn.Module | None

    def set_reference(self, reference: Reference) -> None:
        """Take the reference over."""
        self.reference, self.ref_model = reference, reference.module
        if isinstance(reference, FrozenModel):
            self._ddp_params_and_buffers_to_ignore = reference.ddp_ignored_names("ref_model")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to()` and its relatives do; a reference with a device of its own is cast but stays there."""
        if self.reference.device is None:
            return super()._apply(fn, recurse)
        assert isinstance(self.reference, FrozenModel)
        ref_model, self.ref_model = self.ref_model, None
        try:
            super()._apply(fn, recurse)
        finally:
            self.ref_model = ref_model
        self.reference.apply_cast(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy whose policy reads no weights but its own, with a tied head in x-transformers too."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy_with_closures(self.__dict__, self, memo))
        return twin
