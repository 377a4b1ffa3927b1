"""Models of transformers that rescale their weights in eval mode (RWKV-4)."""

from torch import nn


def rescales_in_eval_mode(model: nn.Module) -> bool:
    """Whether a model of transformers (RWKV-4, which has no dropout) rescales its weights in eval mode."""
    return any(hasattr(module, "layers_are_rescaled") for module in model.modules())


def undo_rescaling(model: nn.Module) -> None:
    """Give weights that a model of transformers rescales in eval mode (RWKV-4) the scale they train at.

    Such a model rescales them again by itself, in its next forward pass in eval mode.
    """
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            is_training, module.training = module.training, True
            module._rescale_layers()  # type: ignore[operator]
            module.training = is_training
