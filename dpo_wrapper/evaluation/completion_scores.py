"""Log-probs of completions under a policy and its reference, on the fast path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_wrapper.batches import ScoredSequences, SequenceLogProbs
from dpo_wrapper.data import TokenizedExample
from dpo_wrapper.data.collate import group_by_tokens
from dpo_wrapper.dpo import DPO
from dpo_wrapper.losses import Sigmoid
from dpo_wrapper.metrics import Rewards
from dpo_wrapper.scoring.rounding import narrowest_dtype

MAX_BATCH_TOKENS = 16384
"""Tokens that go through a model at once, shared prefixes counted once."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CompletionScores:
    """Scores of `c` completions.

    Attributes:
        policy, reference: Float[c], log-probs in nats, sums over the scored tokens; `reference` is None where
            there is none.
        length: Int[c], numbers of scored tokens.
        reward: Float[c], what the loss compares completions by, in nats.
        rounding: Float[c], how far rewards may be off because log-probs are rounded (`metrics.Rewards`).
        token_kl: Float[c], sums over the tokens of `r/p - 1 - log(r/p)`, of probabilities of single tokens
            (Schulman's k3); None without a reference. Over completions that the policy has sampled its mean
            estimates KL(policy || reference), and it is never negative.
    """

    policy: Floats
    reference: Floats | None
    length: NDArray[np.int64]
    reward: Floats
    rounding: Floats
    token_kl: Floats | None

    def __getitem__(self, index: Any) -> "CompletionScores":
        """Those of some of the completions."""
        values: dict[str, Any] = {
            name: None if value is None else value[index] for name, value in vars(self).items()
        }
        return CompletionScores(**values)


@torch.no_grad()
def score_completions(
    dpo: DPO,
    examples: Sequence[TokenizedExample],
    max_tokens: int = MAX_BATCH_TOKENS,
    progress: Callable[[int], object] | None = None,
) -> CompletionScores:
    """The scores of all completions of all examples, in their order.

    A prefix that completions share is computed once. Policy and reference are computed in eval mode, without
    gradients, in float32 or wider from the logits on.

    Args:
        dpo: policy and reference on one device; its loss says what a reward is. A loss without rewards has
            those of `Sigmoid()`.
        examples: at least one.
        max_tokens: how many tokens go through the model at once.
        progress: called with the number of examples that were just scored.
    """
    device = next(dpo.policy_model.parameters()).device
    first = make_sequences(examples[:1]).to(device)
    is_padded = dpo.policy.check(first).tree is None
    ends = np.cumsum([len(example.completions) for example in examples])
    total = int(ends[-1])
    columns = np.zeros((5, total))
    length = np.zeros(total, np.int64)
    loss = dpo.loss.reward_loss or Sigmoid()
    has_reference = True
    for group in group_by_tokens(examples, max_tokens, is_padded=is_padded):
        chosen = [examples[k] for k in group]
        sequences = make_sequences(chosen).prebuild_tree(dpo.policy.tree_options).to(device)
        policy, reference = dpo.score_sequences(sequences)
        reference_sums = None if reference is None else reference.sums.to(policy.sums.dtype)
        dtype = narrowest_dtype(dpo, device)
        rewards = Rewards.compute(loss, policy.sums, reference_sums, sequences.length, dtype)
        rows = [policy.sums, rewards.values, rewards.rounding]
        has_reference = reference_sums is not None
        if reference_sums is not None:
            rows += [reference_sums, estimate_token_kl(sequences, policy, reference)]
        places = np.concatenate([np.arange(ends[k] - len(examples[k].completions), ends[k]) for k in group])
        columns[: len(rows), places] = torch.stack(rows).cpu().numpy()
        length[places] = sequences.length.cpu().numpy()
        if progress is not None:
            progress(len(group))
    policy_sums, reward, rounding, *others = columns
    ref_sums, token_kl = others if has_reference else (None, None)
    return CompletionScores(policy_sums, ref_sums, length, reward, rounding, token_kl)


def make_sequences(examples: Sequence[TokenizedExample]) -> ScoredSequences:
    parts = [part for example in examples for part in example.sequences]
    return ScoredSequences.from_lists(*zip(*parts, strict=True))


def estimate_token_kl(
    sequences: ScoredSequences, policy: SequenceLogProbs, reference: SequenceLogProbs | None
) -> torch.Tensor:
    """Schulman's k3 of each token, summed for each sequence; NaN where single tokens are not known."""
    if reference is None or policy.tokens is None or reference.tokens is None:
        return torch.full_like(policy.sums, torch.nan)
    ratio = reference.tokens.to(policy.tokens.dtype) - policy.tokens
    return sequences.sum_per_sequence(ratio.expm1() - ratio)
