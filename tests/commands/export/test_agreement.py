"""What counts as the same, and what does not."""

import numpy as np
import pytest
import torch
from torch import nn

from dpo_wrapper.commands.export.agreement import ExportError, PromptOutput, compare, compute_outputs
from dpo_wrapper.commands.export.transformers_reader import ModuleReader
from dpo_wrapper.commands.export.weights import WeightDigests
from dpo_wrapper.data import ByteTokenizer

LOGITS = np.array([[0.0, 1.0, 4.0], [5.0, 4.98, 0.0]], dtype=np.float32)
OUTPUT = PromptOutput("p", (7, 8), (2, 0), LOGITS)


class FakeReader:
    """Says the logits of the answer behind those of the prompt, as a program would."""

    name = "program"

    def __init__(self, logits):
        self.logits = np.array(logits, dtype=np.float32)

    def compute_logits(self, ids):
        assert list(ids) == [7, 8, 2]
        before = np.full((len(ids) - len(self.logits), self.logits.shape[1]), 9.0, dtype=np.float32)
        return np.concatenate([before, self.logits])


def test_the_largest_difference_is_relative_to_the_spread():
    agreement = compare([OUTPUT], FakeReader(LOGITS + np.array([[0.0, 0.0, 0.05], [0.0, -0.1, 0.0]])), 0.03)
    assert agreement.difference == pytest.approx(0.1 / 5.0)
    assert (agreement.num_equal, agreement.num_ties, agreement.num_tokens) == (2, 0, 2)
    agreement.check()


def test_ids_beyond_those_of_the_model_may_be_there():
    wider = np.concatenate([LOGITS, np.full((2, 4), -99.0)], axis=1)
    assert compare([OUTPUT], FakeReader(wider), 1e-6).difference == 0
    with pytest.raises(ExportError, match="should have 3 logits for a token, but by program it has 2"):
        compare([OUTPUT], FakeReader(LOGITS[:, :2]), 1e-6)


def test_a_tie_within_the_tolerance_may_turn_round():
    """The two largest logits of the second token are 0.02 apart, 0.004 of the spread."""
    turned = LOGITS + np.array([[0.0, 0.0, 0.0], [-0.015, 0.015, 0.0]])
    agreement = compare([OUTPUT], FakeReader(turned), 0.005)
    assert (agreement.num_equal, agreement.num_ties) == (1, 1)
    agreement.check()
    assert agreement.words == (
        "program: logits differ by 3.0e-03 of their spread at most (rounding explains 5e-03), 1 of 2 greedy "
        "tokens are the same, 1 a tie within that"
    )


@pytest.mark.parametrize("change", [0.3, np.nan, np.inf])
def test_what_rounding_does_not_explain_differs(change):
    agreement = compare([OUTPUT], FakeReader(LOGITS + np.array([[change, 0.0, 0.0], [0.0, 0.0, 0.0]])), 0.03)
    assert not agreement.difference <= 0.03
    with pytest.raises(ExportError, match=r"but it does not \(program: logits differ.*\): do not use it\.$"):
        agreement.check()


def test_another_token_differs_also_where_each_logit_is_within_the_tolerance():
    """It was 3 behind the largest logit, 0.6 of the spread; both have moved by 0.32 of it at most."""
    agreement = compare([OUTPUT], FakeReader([[0.0, 2.6, 2.5], LOGITS[1]]), 0.4)
    assert agreement.difference == pytest.approx(0.32) and agreement.num_ties == 0
    with pytest.raises(ExportError, match="1 of 2 greedy tokens"):
        agreement.check()


class NextByte(nn.Module):
    """Says that each byte is followed by the next one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        assert ids.shape[1] <= 12
        return self.scale * nn.functional.one_hot((ids + 1) % 263, 263).float()


def test_answers_are_the_most_likely_tokens_each_after_those_before():
    (output,) = compute_outputs(NextByte(), ByteTokenizer(), ["ab"], 3, as_chat=False)
    assert (output.prompt_ids, output.answer_ids) == ((256, *b"ab"), tuple(b"cde"))
    assert output.ids == [256, *b"abcd"] and output.logits.shape == (3, 263)


def test_the_beginning_of_a_prompt_without_room_is_left_out():
    options = {"as_chat": False, "max_positions": 12}
    (output,) = compute_outputs(NextByte(), ByteTokenizer(), ["0123456789abcdef"], 3, **options)
    assert bytes(output.prompt_ids) == b"6789abcdef" and len(output.ids) == 12


def test_a_model_with_another_bit_is_found_out():
    linear = nn.Linear(4, 4)
    weights = WeightDigests.of(linear, torch.bfloat16)
    ModuleReader("torch", lambda: linear, weights)
    with torch.no_grad():
        linear.weight[1, 2] *= 1 + 2**-6
    with pytest.raises(ExportError, match=r"but 1 of 2 tensors are others \(weight\): do not use it"):
        ModuleReader("torch", lambda: linear, weights)
    with pytest.raises(ExportError, match=r"but 2 of 2 tensors are others"):
        ModuleReader("torch", lambda: nn.Linear(4, 5), weights)
