"""DPO's loss in plain lines, from all logits of one sequence at a time, and steps of training."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from dpo_wrapper import DPO
from helpers.batches import random_batch
from helpers.dpo_calls import LN2, arguments

CASE = random_batch(Generator().manual_seed(0), b=3, odd=0)
ARGUMENTS = arguments(CASE)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """A model's logits for one sequence without padding, in float32."""
    output = model(ids[None])
    return getattr(output, "logits", output)[0].float()


def naive_sums(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Log-probs of `CASE`'s chosen and rejected sequences."""
    sides = []
    for seqs, prompts, reals in zip(
        (CASE.preferred_seq, CASE.unpreferred_seq), CASE.prompt_masks, CASE.seq_masks, strict=True
    ):
        sums = []
        for seq, prompt, real in zip(seqs, prompts, reals, strict=True):
            ids, scored = seq[real], ~prompt[real]
            scores = logits_of(model, ids)[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            sums.append((scores * scored[1:]).sum())
        sides.append(torch.stack(sums))
    return sides[0], sides[1]


def naive_loss(model: nn.Module, reference: nn.Module) -> Tensor:
    """The loss of `CASE` at beta = 0.1."""
    p_w, p_l = naive_sums(model)
    with torch.no_grad():
        r_w, r_l = naive_sums(reference)
    return -F.logsigmoid(0.1 * ((p_w - r_w) - (p_l - r_l))).mean()


def reference_log_probs(dpo: DPO) -> tuple[float, float]:
    """The mean log-probs of `CASE` under the reference."""
    metrics = dpo(**ARGUMENTS, return_metrics=True)[1]
    return metrics["logps/ref_chosen"].item(), metrics["logps/ref_rejected"].item()


def train(dpo: DPO, steps: int = 3) -> None:
    """Train on `CASE`."""
    optimizer = torch.optim.AdamW([p for p in dpo.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        dpo(**ARGUMENTS).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_reference_stays(dpo: DPO) -> None:
    """That it starts where the policy does, and is bit for bit the same when the policy has moved away."""
    assert abs(dpo(**ARGUMENTS).item() - LN2) < 1e-6
    before = reference_log_probs(dpo)
    train(dpo)
    assert reference_log_probs(dpo) == before
    assert abs(dpo(**ARGUMENTS).item() - LN2) > 1e-5
