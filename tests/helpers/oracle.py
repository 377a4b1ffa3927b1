"""The slow truth: DPO in float64, one token at a time.

Nothing here is batched, masked, padded, shifted or cached. A token's score is read off a fresh forward on the
real tokens before it and on nothing else, so that none of the usual mistakes can be made. It shares no code
with the package under test, and must not: two ways to one number are worth something only while independent.

Axes: `b` rows, `n` positions, `v` vocabulary, `p` pairs. Scores are in nats.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Scalar = Float[Tensor, ""]
# (p_w, p_l, r_w, r_l, n_w, n_l) -> loss of one pair
PairLoss = Callable[[Scalar, Scalar, Scalar, Scalar, int, int], Scalar]


# models


class ExactFloat64(TorchFunctionMode):
    """Inside, a cast to float32 becomes a cast to float64.

    Many models round to float32 on the way whatever their dtype: x-transformers in its softmax, Hugging Face
    in RMSNorm, eager softmax and rotary angles. After `model.double()` alone, logits are off by about 1e-6.
    Only for models that are float64 already; to compare code under test with the oracle more closely than
    that, run the code inside too.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double

        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


def to_float64(model: nn.Module) -> nn.Module:
    """The same module, changed in place: float64, eval mode. What every function below asks for."""
    return model.double().eval()


def is_x_transformers(model: nn.Module) -> bool:
    return any(kind.__module__.split(".")[0] == "x_transformers" for kind in type(model).__mro__)


def logits_of(model: nn.Module, ids: Int[Tensor, "n"]) -> Float[Tensor, "n v"]:
    """Logits of one unpadded sequence: x-transformers (wrapped or not), Hugging Face, or a plain module."""
    net = getattr(model, "net", None)
    if is_x_transformers(model) and isinstance(net, nn.Module):
        model = net

    out = model(ids[None])
    logits = getattr(out, "logits", out)
    assert logits.shape[:2] == (1, len(ids)) and logits.ndim == 3, f"not logits: {tuple(logits.shape)}"
    return logits[0]


def check_exact(model: nn.Module) -> None:
    assert not any(module.training for module in model.modules()), (
        "the oracle wants eval mode: to_float64(model)"
    )

    floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert all(t.dtype == torch.float64 for t in floats), "the oracle wants float64: to_float64(model)"


# scores


def token_scores(model: nn.Module, ids: Int[Tensor, "n"], scored: Bool[Tensor, "n"]) -> list[Scalar]:
    """`log p(ids[i] | ids[:i])` for each scored `i > 0`, in order; `ids` are real tokens. Differentiable."""
    assert ids.shape == scored.shape and ids.ndim == 1
    check_exact(model)

    scores = []
    for i in range(1, len(ids)):  # nothing stands before the first token, so nothing predicts it
        if not scored[i]:
            continue

        with ExactFloat64():
            before = logits_of(model, ids[:i])
            score = before[-1].log_softmax(dim=-1)[ids[i]]

        assert score.dtype == torch.float64
        scores.append(score)

    return scores


def sequence_score(
    model: nn.Module, seq: Int[Tensor, "n"], prompt_mask: Bool[Tensor, "n"], seq_mask: Bool[Tensor, "n"]
) -> tuple[Scalar, int]:
    """Sum over the scored tokens of one row, and their number. Padding is dropped wherever it stands."""
    assert seq.shape == prompt_mask.shape == seq_mask.shape and seq.ndim == 1
    assert prompt_mask.dtype == seq_mask.dtype == torch.bool

    real = [i for i in range(len(seq)) if seq_mask[i]]
    scores = token_scores(model, seq[real], ~prompt_mask[real])

    total = torch.zeros((), dtype=torch.float64, device=seq.device)
    for score in scores:
        total = total + score
    return total, len(scores)


def no_gradient_zero(model: nn.Module) -> Scalar:
    """A zero that `backward` can be called on."""
    zero = torch.zeros((), dtype=torch.float64)
    for parameter in model.parameters():
        zero = zero.to(parameter.device) + 0.0 * parameter.sum()
    return zero


def dpo_oracle(
    policy: nn.Module,
    reference: nn.Module | None,
    preferred_seq: Int[Tensor, "b n"],
    unpreferred_seq: Int[Tensor, "b m"],
    prompt_masks: tuple[Bool[Tensor, "b n"], Bool[Tensor, "b m"]],
    seq_masks: tuple[Bool[Tensor, "b n"], Bool[Tensor, "b m"]],
    loss: PairLoss,
) -> dict[str, Tensor]:
    """Everything about a batch, by name.

    - `policy_preferred`, `policy_unpreferred`, `reference_preferred`, `reference_unpreferred`: `Float[b]`,
      sums over scored tokens; zeros without a reference, which gets no gradient.
    - `count_preferred`, `count_unpreferred`: `Int[b]`, how many tokens are scored.
    - `valid`: `Bool[b]`, whether both sides have a scored token.
    - `losses`: `Float[b]`, zero where invalid; `loss`: their mean over the valid pairs, zero without any.
    """
    assert len(preferred_seq) == len(unpreferred_seq)
    sides = dict(preferred=preferred_seq, unpreferred=unpreferred_seq)

    result: dict[str, Tensor] = {}
    for (side, seqs), prompt_mask, seq_mask in zip(sides.items(), prompt_masks, seq_masks, strict=True):
        sums, ref_sums, counts = [], [], []

        for row in zip(seqs, prompt_mask, seq_mask, strict=True):
            total, count = sequence_score(policy, *row)
            ref_total = torch.zeros_like(total)

            if reference is not None:
                with torch.no_grad():
                    ref_total, ref_count = sequence_score(reference, *row)
                assert ref_count == count

            sums.append(total)
            ref_sums.append(ref_total)
            counts.append(torch.tensor(count))

        result[f"policy_{side}"] = torch.stack(sums)
        result[f"reference_{side}"] = torch.stack(ref_sums)
        result[f"count_{side}"] = torch.stack(counts)

    losses, valid, total, num_valid = [], [], no_gradient_zero(policy), 0
    for i in range(len(preferred_seq)):
        n_w, n_l = int(result["count_preferred"][i]), int(result["count_unpreferred"][i])
        valid.append(torch.tensor(n_w > 0 and n_l > 0))
        losses.append(torch.zeros_like(total))

        if valid[-1]:
            losses[-1] = loss(
                result["policy_preferred"][i],
                result["policy_unpreferred"][i],
                result["reference_preferred"][i],
                result["reference_unpreferred"][i],
                n_w,
                n_l,
            )
            total = total + losses[-1]
            num_valid += 1

    return result | dict(
        valid=torch.stack(valid), losses=torch.stack(losses), loss=total / num_valid if num_valid else total
    )


# losses: shared/losses.md, one pair at a time


def log_sigmoid(x: Scalar) -> Scalar:
    """`log(1 / (1 + e^-x))`, with the exponent never above zero."""
    if x >= 0:
        return -torch.log1p(torch.exp(-x))
    return x - torch.log1p(torch.exp(x))


def positive_beta(make: Callable[..., PairLoss]) -> Callable[..., PairLoss]:
    @wraps(make)
    def checked(beta: float, *args: float, **kwargs: float) -> PairLoss:
        assert math.isfinite(beta) and beta > 0
        return make(beta, *args, **kwargs)

    return checked


@positive_beta
def sigmoid_loss(beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """Rafailov 2023, eq. 7; with label smoothing, Mitchell 2023."""

    def pair_loss(p_w: Scalar, p_l: Scalar, r_w: Scalar, r_l: Scalar, n_w: int, n_l: int) -> Scalar:
        delta = (p_w - r_w) - (p_l - r_l)
        agree, disagree = log_sigmoid(beta * delta), log_sigmoid(-beta * delta)
        return -(1 - label_smoothing) * agree - label_smoothing * disagree

    return pair_loss


@positive_beta
def sigmoid_norm_loss(beta: float) -> PairLoss:
    """As `sigmoid_loss`, of the means over the scored tokens."""

    def pair_loss(p_w: Scalar, p_l: Scalar, r_w: Scalar, r_l: Scalar, n_w: int, n_l: int) -> Scalar:
        return -log_sigmoid(beta * ((p_w - r_w) / n_w - (p_l - r_l) / n_l))

    return pair_loss


@positive_beta
def ipo_loss(beta: float) -> PairLoss:
    """Azar 2023, eq. 17, of the means over the scored tokens."""

    def pair_loss(p_w: Scalar, p_l: Scalar, r_w: Scalar, r_l: Scalar, n_w: int, n_l: int) -> Scalar:
        return ((p_w - r_w) / n_w - (p_l - r_l) / n_l - 1 / (2 * beta)) ** 2

    return pair_loss


@positive_beta
def simpo_loss(beta: float, gamma: float) -> PairLoss:
    """Meng 2024: no reference."""

    def pair_loss(p_w: Scalar, p_l: Scalar, r_w: Scalar, r_l: Scalar, n_w: int, n_l: int) -> Scalar:
        return -log_sigmoid(beta * (p_w / n_w - p_l / n_l) - gamma)

    return pair_loss


def sft_oracle(result: dict[str, Tensor]) -> Scalar:
    """Minus the mean log-prob over all scored preferred tokens of a `dpo_oracle`'s valid pairs."""
    total, count = 0.0 * result["loss"], 0
    for i, valid in enumerate(result["valid"]):
        if valid:
            total = total - result["policy_preferred"][i]
            count += int(result["count_preferred"][i])
    return total / count if count else total
