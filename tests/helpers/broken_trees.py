"""Layers with a state over a prefix tree: the mistakes that the trial should find, and where none can be."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from dpo_wrapper.models import hugging_face_recurrence, x_transformers
from dpo_wrapper.prefix_tree import TreeLayout, note_kernel


def require_forks() -> None:
    """Skip a test where the layers of transformers are too old to pass a state on to branches."""
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    if not hugging_face_recurrence.called_functions(Lfm2ShortConv):
        pytest.skip("all layers with a state run along the paths in this version of transformers")


def mix_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have convolutions and shifts of tokens run over a tree's row as if it were one sequence."""

    def convolve_row(layout: TreeLayout, x: Tensor, _width: int, convolve: Any) -> Tensor:
        note_kernel(layout, "fork")
        return convolve(x)

    def shift_row(layout: TreeLayout, x: Tensor, distance: int) -> Tensor:
        note_kernel(layout, "fork")
        return F.pad(x, (0, 0, distance, -distance))

    monkeypatch.setattr(hugging_face_recurrence, "convolve_over_tree", convolve_row)
    monkeypatch.setattr(x_transformers, "shift_over_tree", shift_row)


def forget_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each branch begin with a state of zeros."""
    change_states(monkeypatch, lambda state: None)


def detach_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the states behind forks be constants."""
    change_states(monkeypatch, Tensor.detach)


def change_states(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the states with which branches begin."""
    scan_over_tree = hugging_face_recurrence.scan_over_tree

    def scan_wrongly(layout: TreeLayout, inputs: Any, gates: Any, scan: Any, *args: Any) -> Tensor:
        def scan_segments(tokens: Any, state: Tensor | None) -> Any:
            return scan(tokens, None if state is None else change(state))

        return scan_over_tree(layout, inputs, gates, scan_segments, *args)

    monkeypatch.setattr(hugging_face_recurrence, "scan_over_tree", scan_wrongly)
