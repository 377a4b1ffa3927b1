import copy
from types import SimpleNamespace

import torch
from torch import Generator, Tensor, nn

from dpo_wrapper import DPO
from helpers.models import VOCAB, ZOO

LENGTHS = ((3, 5, 2), (1, 4, 7), (6, 1, 3), (2, 8, 8), (4, 3, 1))


def tokens(seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    generator = Generator().manual_seed(seed)
    return [
        tuple(torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths)
        for lengths in LENGTHS
    ]


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="</s>", eos_token="</s>"
    )


def models() -> tuple[nn.Module, nn.Module]:
    """A policy, and a reference that is near it."""
    reference = ZOO["hf-llama"](0).eval()
    policy = copy.deepcopy(reference)
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy, reference


def padded(side: int, rows: list) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, prompt mask and padding mask of one side."""
    width = max(len(row[0]) + len(row[side]) for row in rows)
    ids, prompt, real = torch.zeros(3, len(rows), width, dtype=torch.long)
    for k, row in enumerate(rows):
        both = row[0] + row[side]
        ids[k, : len(both)] = torch.tensor(both)
        prompt[k, : len(row[0])], real[k, : len(both)] = 1, 1
    return ids, prompt.bool(), real.bool()


def ours(
    policy: nn.Module, reference: nn.Module, loss, ld_alpha: float = 1.0, wpo: bool = False, **columns
) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients, over the prefix tree and through the fused gather."""
    options = {"share_prefix": True, "log_prob_impl": "chunked", "ld_alpha": ld_alpha, "wpo": wpo}
    dpo = DPO(policy, loss=loss, reference=reference, **options)
    chosen, rejected = (padded(side, tokens()) for side in (1, 2))
    masks = [(chosen[k], rejected[k]) for k in (1, 2)]
    return differentiated(dpo(chosen[0], rejected[0], *masks, **columns), policy)


def differentiated(loss: Tensor, policy: nn.Module) -> tuple[Tensor, list[Tensor]]:
    found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True, materialize_grads=True)
    return loss.detach(), list(found)


def difference(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> float:
    """The larger of the relative differences of value and of gradient, each by the largest component."""
    value = (ours[0] - theirs[0]).abs() / theirs[0].abs()
    apart = max(float((a - b).abs().max()) for a, b in zip(ours[1], theirs[1], strict=True))
    return max(float(value), apart / max(float(b.abs().max()) for b in theirs[1]))


def theirs(made: SimpleNamespace, types: list[str], weights=None, **options) -> tuple[Tensor, list[Tensor]]:
    defaults = {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_types": types,
        "loss_weights": weights or [1.0] * len(types),
        "ld_alpha": None,
        "use_weighting": False,
    }
    for name, value in (defaults | options).items():
        owner = made.trainer.args if name == "discopop_tau" else made.trainer
        assert hasattr(owner, name), name
        setattr(owner, name, value)
    return differentiated(made.trainer.compute_loss(made.trainer.model, made.inputs), made.policy)
