"""Layers that carry a state along the sequence, told by what they are made of."""

from torch import nn

STATE_PARAMETERS = {"A_log", "time_decay", "recurrent_param", "recurrent_gate_weight"}
"""Names of parameters by which layers of Mamba, Gated DeltaNet, RWKV and Griffin let their state decay."""


def find_recurrent_layers(model: nn.Module) -> list[str]:
    """The classes of layers with a recurrent state or a short convolution, such as `MambaMixer`."""
    return sorted({type(module).__name__ for module in model.modules() if carries_state(module)})


def carries_state(module: nn.Module) -> bool:
    """Whether a layer has a state that decays, or a convolution over tokens (one filter for each channel)."""
    convolutions = (child for child in module.children() if isinstance(child, nn.Conv1d))
    is_convolution = any(child.groups == child.in_channels > 1 for child in convolutions)
    return is_convolution or not STATE_PARAMETERS.isdisjoint(
        name for name, _ in module.named_parameters(recurse=False)
    )
