"""How commands load the models that they do not train."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """Dtype and device of models."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights. auto: float32 on the CPU, and elsewhere that in which they are stored."""
    cpu: bool = False
    """Compute on the CPU where there is an accelerator."""

    @property
    def loading(self) -> dict[str, Any]:
        """The options as `load_model_pair` and `load_judge` take them."""
        import torch

        dtype = None if self.dtype == "auto" else getattr(torch, self.dtype)
        return {"dtype": dtype, "device": "cpu" if self.cpu else None}
