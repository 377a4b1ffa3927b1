"""One contestant of log_probs.py, in a process of its own: the log-probs of all tokens and their gradients.

A contestant is a function of hidden states, head and targets. It returns what its gradient is taken of, that
gradient's upstream, and the log-probs of all tokens if it hands them out.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from measure import Missing, can_weigh, forget_peak, gemm_rate, status, tidy, timed
from torch import Tensor

from dpo_wrapper import token_log_probs
from dpo_wrapper.cpu_matmul import matmul
from dpo_wrapper.log_probs import FusedLoss

BETA = 0.1
SAMPLE = 16
"""Tokens that are held against float64."""

PRODUCTS = {"forward": 1, "frozen": 2, "trained": 3}
"""Each mode with its products of 2·t·d·v FLOPs, if nothing is computed twice."""


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [t, d]
    weight: Tensor  # [v, d]
    targets: Tensor  # [t]
    upstream: Tensor  # [t], what a DPO loss hands back at its start
    sequence: int  # tokens of each sequence, chosen ones in the first half


def draw(t: int, d: int, v: int, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Words as frequent as Zipf has them, and hidden states that know of their target: a softmax with the
    few likely words and the long tail that a language model's has."""
    generator = torch.Generator(device).manual_seed(seed)
    frequency = -torch.arange(1.0, v + 1, device=device).log()  # [v], of the most frequent word first
    targets = torch.multinomial(frequency.exp(), t, replacement=True, generator=generator)
    weight = torch.randn(v, d, generator=generator, device=device).div_(math.sqrt(d))
    hidden = 2 * torch.randn(t, d, generator=generator, device=device) + 6 * weight[targets]
    shared = 1 / math.sqrt(d)  # a direction of length 1 along which hidden states know how frequent words are
    weight += frequency[:, None] / 8 * shared
    hidden += 8 * shared
    upstream = torch.full((t,), BETA / 2, device=device)
    upstream[: t // 2] *= -1
    longest = min(256, t // 2)
    sequence = next(n for n in range(longest, 0, -1) if t % (2 * n) == 0)
    return Inputs(hidden.to(dtype), weight.to(dtype), targets, upstream, sequence)


@dataclass(frozen=True)
class Truth:
    """Of a sample of tokens, in float64."""

    rows: Tensor
    log_probs: Tensor
    slopes: Tensor  # [r, d], of each log-prob by its hidden state


def truth(of: Inputs) -> Truth:
    rows = torch.linspace(0, len(of.targets) - 1, SAMPLE, device=of.hidden.device).long().unique()
    hidden = of.hidden[rows].double().requires_grad_()
    every = (hidden @ of.weight.double().T).log_softmax(dim=-1)
    log_probs = every.gather(-1, of.targets[rows][:, None])[:, 0]
    (slopes,) = torch.autograd.grad(log_probs.sum(), hidden)
    return Truth(rows, log_probs.detach(), slopes)


# contestants

Outcome = tuple[Tensor, Tensor, Tensor | None]
Contestant = Callable[[Inputs, Tensor, Tensor], Outcome]


def ours(impl: str) -> Contestant:
    def run(of: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        scores = token_log_probs(hidden, weight, of.targets, impl=impl)
        return scores, of.upstream, scores

    return run


def ahead() -> Contestant:
    """The same, told which loss the log-probs will be made into, as `DPO` does by itself."""

    def run(of: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        pairs = len(of.targets) // (2 * of.sequence)
        side = torch.arange(pairs, device=hidden.device).repeat_interleave(of.sequence)

        def loss(scores: Tensor) -> Tensor:  # a DPO loss at its start, where policy and reference agree
            sums = scores.view(2, pairs, of.sequence).sum(dim=-1)
            chosen, rejected = sums - sums.detach()
            return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).sum()

        told = FusedLoss(loss, torch.cat([side, side]))
        scores = token_log_probs(hidden, weight, of.targets, fused_loss=told)
        return loss(scores), torch.ones((), device=hidden.device), scores

    return run


def compiled() -> Contestant:
    @torch.compile
    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)

    def run(of: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        scores = plain(hidden, weight, of.targets)
        return scores, of.upstream, scores

    return run


def trl() -> Contestant:
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        raise Missing(f"not installed, or of another version: pip install trl==1.16.0 ({error})") from None

    def run(of: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        scores, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, of.targets, *options)
        return scores, of.upstream, scores

    return run


def liger() -> Contestant:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise Missing(f"not installed: pip install liger-kernel ({error})") from None
    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def run(of: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        sequences, targets = hidden.unflatten(0, (-1, of.sequence)), of.targets.view(-1, of.sequence)
        loss, (chosen, rejected, *_) = loss_of(weight, sequences, targets)
        slope = -BETA * torch.sigmoid(BETA * (rejected - chosen).double()) / len(chosen)
        # for the check alone: what this loss hands back to each token
        run.upstream = torch.cat([slope, -slope]).repeat_interleave(of.sequence)  # type: ignore[attr-defined]
        return loss, torch.ones_like(loss), None

    return run


def cut_cross_entropy(impl: str, device: str) -> Contestant:
    if impl == "cce" and device != "cuda":
        raise Missing("needs CUDA")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Missing(f"not installed: pip install cut-cross-entropy ({error})") from None

    def run(of: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        scores = -linear_cross_entropy(hidden, weight, of.targets, reduction="none", impl=impl)
        return scores, of.upstream, scores

    return run


CONTESTANTS: dict[str, Callable[[str], Contestant]] = {
    "triton": lambda device: ours("triton"),
    "chunked": lambda device: ours("chunked"),
    "ahead": lambda device: ahead(),
    "eager": lambda device: ours("eager"),
    "compile": lambda device: compiled(),
    "trl": lambda device: trl(),
    "liger": lambda device: liger(),
    "cce": lambda device: cut_cross_entropy("cce", device),
    "cce-compile": lambda device: cut_cross_entropy("torch_compile", device),
}


# measuring


class Scales:
    """Peak memory of a call beyond what is there before it; what the call returns counts."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.works = self.cuda or can_weigh()

    def weigh(self, function: Callable[[], Any]) -> tuple[Any, float | None]:
        """What the function returns, and MB."""
        tidy()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = function()
            torch.cuda.synchronize()
            return found, (torch.cuda.max_memory_allocated() - before) / 1e6
        if not self.works:
            return function(), None
        forget_peak()
        before = status("VmRSS")
        found = function()
        return found, (status("VmHWM") - before) / 1e6


def relative(found: Tensor, true: Tensor) -> float:
    """The largest error among the sampled tokens, relative to the token's own truth."""
    found, true = found.double().view(len(true), -1), true.view(len(true), -1)
    return float(((found - true).norm(dim=1) / true.norm(dim=1)).max())


def errors(run: Contestant, of: Inputs, true: Truth, found: tuple[Tensor | None, ...]) -> dict[str, float]:
    scores, grad_hidden, *_ = found
    of_mode: dict[str, float] = {}
    if scores is not None:
        of_mode["log_prob_error"] = relative(scores[true.rows], true.log_probs)
        of_mode["log_prob_error_nats"] = float((scores[true.rows].double() - true.log_probs).abs().max())
    if grad_hidden is not None:
        upstream = getattr(run, "upstream", of.upstream)[true.rows].double()
        of_mode["grad_error"] = relative(grad_hidden[true.rows], upstream[:, None] * true.slopes)
    return of_mode


def one_mode(
    mode: str, run: Contestant, of: Inputs, true: Truth, scales: Scales, runs: int, rate: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """What there is to say of a mode, better known with each stretch: one that warms up, the timed ones, and
    one that is weighed."""
    hidden = of.hidden.detach().requires_grad_(mode != "forward")
    weight = of.weight.detach().requires_grad_(mode == "trained")
    device = hidden.device.type

    def once() -> tuple[Tensor | None, ...]:
        with torch.set_grad_enabled(mode != "forward"):
            result, upstream, scores = run(of, hidden, weight)
            scores = None if scores is None else scores.detach()
            if mode == "forward":
                return scores, None
            wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
            return scores, *torch.autograd.grad(result, wanted, upstream.to(result.dtype))

    known: dict[str, Any] = {"first_seconds": timed(once, device)}
    yield known
    rates, seconds = [], []
    for _ in range(runs):
        before = rate()
        seconds.append(timed(once, device))
        rates.append((before + rate()) / 2)
        yield known
    found, peak = scales.weigh(once)
    flops = PRODUCTS[mode] * 2.0 * hidden.numel() * len(weight)
    known |= {
        "seconds": statistics.median(seconds),
        "runs": seconds,
        "peak_mb": peak,
        "gemm_rate": statistics.median(rates),
        "floor_seconds": flops / statistics.median(rates),
        "share_of_floor": statistics.median(flops / r / s for r, s in zip(rates, seconds, strict=True)),
        **errors(run, of, true, found),
    }
    tidy()
    yield known


def tried(of_mode: Iterator[dict[str, Any]], stretches: int) -> Iterator[dict[str, Any]]:
    """The same, in as many stretches even if it fails, with the reason then."""
    known: dict[str, Any] = {}
    for _ in range(stretches):
        try:
            known = next(of_mode, known)
        except Exception as error:  # of whatever kind: it is a line of the table
            text = (str(error).strip().splitlines() or [""])[0]
            known = {"failed": f"{type(error).__name__}: {text}"[:160]}
        yield known


def measure(args: Namespace) -> Generator[None, None, dict[str, Any]]:
    """What the contestant `args.contestant` needs, by mode, measured in stretches; at last it is returned."""
    torch.set_num_threads(args.threads)
    (t, d, v), dtype = args.shape[0], getattr(torch, args.dtype)
    try:
        run = CONTESTANTS[args.contestant](args.device)
        of = draw(t, d, v, dtype, args.device, args.seed)
    except Missing as missing:
        return {"missing": str(missing)}
    true, scales = truth(of), Scales(args.device)
    sizes = (min(t, 2048), d, min(v, 16384))

    def rate(**options: Any) -> float:
        return gemm_rate(*sizes, dtype=dtype, device=args.device, repeats=3, **options)

    rate()  # its own buffers, and the threads, are there now
    found: dict[str, Any] = {"modes": {}, "sequence": of.sequence}
    yield
    for mode in PRODUCTS:
        of_mode = one_mode(mode, run, of, true, scales, args.runs, rate)
        for known in tried(of_mode, args.runs + 2):
            found["modes"][mode] = known
            yield
    if args.device == "cpu":
        rate(multiply=matmul)
        found["product_rate"] = rate(multiply=matmul)
    return found
