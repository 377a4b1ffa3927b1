"""Whether a model knows the tokens and positions of examples."""

from itertools import chain

import numpy as np

from dpo_wrapper.data.example_table import ExampleTable
from dpo_wrapper.pretrained import PretrainedModel


def check_limits(pretrained: PretrainedModel, table: ExampleTable) -> None:
    """Raise ValueError if an example has a token or a position that the model does not know."""
    num_ids, max_positions = pretrained.num_embeddings, pretrained.max_positions
    if table.largest_id >= num_ids:
        largest, example = next(
            (largest, one)
            for one in table
            if (largest := max(chain(one.prompt, *one.completions))) >= num_ids
        )
        raise ValueError(
            f"{example.source}: token ids should be below {num_ids}, the size of the model's vocabulary, "
            f"but one is {largest}: use the model's own tokenizer, not {pretrained.tokenizer_name}."
        )
    lengths = table.lengths()
    if max_positions is not None and len(table) and lengths.max() - 1 > max_positions:  # the last is no input
        row = int(np.argmax(lengths - 1 > max_positions))
        raise ValueError(
            f"--max-length should be at most {max_positions + 1}, for the positions of the model end "
            f"at {max_positions}, but {table[row].source} has {lengths[row]} tokens: lower it."
        )
