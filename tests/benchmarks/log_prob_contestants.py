"""One contestant of log_probs.py, in a process of its own: the log-probs of all tokens and their gradients.

A contestant is a function of hidden states, head and targets. It returns what to differentiate,
the upstream gradient, and the log-probs of all tokens if it returns them.
"""

import statistics
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from measure import UnavailableError, can_weigh, forget_peak, gemm_rate, status, tidy, timed
from torch import Tensor
from zipf_inputs import BETA, Inputs, Truth, draw, truth

from dpo_wrapper import token_log_probs
from dpo_wrapper.cpu_matmul import matmul
from dpo_wrapper.log_probs import FusedLoss

PRODUCTS = {"forward": 1, "frozen": 2, "trained": 3}
"""Each mode with its products of 2·t·d·v FLOPs, if nothing is computed twice."""


# contestants

Outcome = tuple[Tensor, Tensor, Tensor | None]
Contestant = Callable[[Inputs, Tensor, Tensor], Outcome]


def ours(impl: str) -> Contestant:
    def run(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        scores = token_log_probs(hidden, weight, inputs.targets, impl=impl)
        return scores, inputs.upstream, scores

    return run


def fused() -> Contestant:
    """The same with `fused_loss=`, which `DPO` passes by itself."""

    def run(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        pairs = len(inputs.targets) // (2 * inputs.sequence)
        side = torch.arange(pairs, device=hidden.device).repeat_interleave(inputs.sequence)

        def loss(scores: Tensor) -> Tensor:  # a DPO loss at its start, where policy and reference agree
            sums = scores.view(2, pairs, inputs.sequence).sum(dim=-1)
            chosen, rejected = sums - sums.detach()
            return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).sum()

        fused_loss = FusedLoss(loss, torch.cat([side, side]))
        scores = token_log_probs(hidden, weight, inputs.targets, fused_loss=fused_loss)
        return loss(scores), torch.ones((), device=hidden.device), scores

    return run


def compiled() -> Contestant:
    @torch.compile
    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)

    def run(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        scores = plain(hidden, weight, inputs.targets)
        return scores, inputs.upstream, scores

    return run


def trl() -> Contestant:
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        raise UnavailableError(f"needs another version: pip install trl==1.16.0 ({error})") from None

    def run(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        scores, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, inputs.targets, *options)
        return scores, inputs.upstream, scores

    return run


def liger() -> Contestant:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise UnavailableError(f"not installed: pip install liger-kernel ({error})") from None
    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def run(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        sequences = hidden.unflatten(0, (-1, inputs.sequence))
        targets = inputs.targets.view(-1, inputs.sequence)
        loss, (chosen, rejected, *_) = loss_of(weight, sequences, targets)
        slope = -BETA * torch.sigmoid(BETA * (rejected - chosen).double()) / len(chosen)
        # for the check alone: what this loss hands back to each token
        run.upstream = torch.cat([slope, -slope]).repeat_interleave(inputs.sequence)  # type: ignore[attr-defined]
        return loss, torch.ones_like(loss), None

    return run


def cut_cross_entropy(impl: str, device: str) -> Contestant:
    if impl == "cce" and device != "cuda":
        raise UnavailableError("needs CUDA")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(f"not installed: pip install cut-cross-entropy ({error})") from None

    def run(inputs: Inputs, hidden: Tensor, weight: Tensor) -> Outcome:
        scores = -linear_cross_entropy(hidden, weight, inputs.targets, reduction="none", impl=impl)
        return scores, inputs.upstream, scores

    return run


CONTESTANTS: dict[str, Callable[[str], Contestant]] = {
    "triton": lambda device: ours("triton"),
    "chunked": lambda device: ours("chunked"),
    "fused": lambda device: fused(),
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
            result = function()
            torch.cuda.synchronize()
            return result, (torch.cuda.max_memory_allocated() - before) / 1e6
        if not self.works:
            return function(), None
        forget_peak()
        before = status("VmRSS")
        result = function()
        return result, (status("VmHWM") - before) / 1e6


def relative_error(computed: Tensor, true: Tensor) -> float:
    """The largest error among the sampled tokens, relative to the token's own truth."""
    computed, true = computed.double().view(len(true), -1), true.view(len(true), -1)
    return float(((computed - true).norm(dim=1) / true.norm(dim=1)).max())


def errors(
    run: Contestant, inputs: Inputs, true: Truth, results: tuple[Tensor | None, ...]
) -> dict[str, float]:
    scores, grad_hidden, *_ = results
    of_mode: dict[str, float] = {}
    if scores is not None:
        of_mode["log_prob_error"] = relative_error(scores[true.rows], true.log_probs)
        of_mode["log_prob_error_nats"] = float((scores[true.rows].double() - true.log_probs).abs().max())
    if grad_hidden is not None:
        upstream = getattr(run, "upstream", inputs.upstream)[true.rows].double()
        of_mode["grad_error"] = relative_error(grad_hidden[true.rows], upstream[:, None] * true.slopes)
    return of_mode


def one_mode(
    mode: str,
    run: Contestant,
    inputs: Inputs,
    true: Truth,
    scales: Scales,
    runs: int,
    rate: Callable[[], float],
) -> Iterator[dict[str, Any]]:
    """What there is to say of a mode, better known with each stretch: one that warms up, the timed ones, and
    one that is weighed."""
    hidden = inputs.hidden.detach().requires_grad_(mode != "forward")
    weight = inputs.weight.detach().requires_grad_(mode == "trained")
    device = hidden.device.type

    def once() -> tuple[Tensor | None, ...]:
        with torch.set_grad_enabled(mode != "forward"):
            result, upstream, scores = run(inputs, hidden, weight)
            scores = None if scores is None else scores.detach()
            if mode == "forward":
                return scores, None
            trained = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
            return scores, *torch.autograd.grad(result, trained, upstream.to(result.dtype))

    figures: dict[str, Any] = {"first_seconds": timed(once, device)}
    yield figures
    rates, seconds = [], []
    for _ in range(runs):
        before = rate()
        seconds.append(timed(once, device))
        rates.append((before + rate()) / 2)
        yield figures
    results, peak = scales.weigh(once)
    flops = PRODUCTS[mode] * 2.0 * hidden.numel() * len(weight)
    figures |= {
        "seconds": statistics.median(seconds),
        "runs": seconds,
        "peak_mb": peak,
        "gemm_rate": statistics.median(rates),
        "floor_seconds": flops / statistics.median(rates),
        "share_of_floor": statistics.median(flops / r / s for r, s in zip(rates, seconds, strict=True)),
        **errors(run, inputs, true, results),
    }
    tidy()
    yield figures


def tried(of_mode: Iterator[dict[str, Any]], stretches: int) -> Iterator[dict[str, Any]]:
    """The same, in as many stretches even if it fails, with the reason then."""
    figures: dict[str, Any] = {}
    for _ in range(stretches):
        try:
            figures = next(of_mode, figures)
        except Exception as error:  # of whatever kind: it is a line of the table
            text = (str(error).strip().splitlines() or [""])[0]
            figures = {"failed": f"{type(error).__name__}: {text}"[:160]}
        yield figures


def measure(args: Namespace) -> Generator[None, None, dict[str, Any]]:
    """What the contestant `args.contestant` needs, by mode, measured in stretches; at last it is returned."""
    torch.set_num_threads(args.threads)
    (t, d, v), dtype = args.shape[0], getattr(torch, args.dtype)
    try:
        run = CONTESTANTS[args.contestant](args.device)
        inputs = draw(t, d, v, dtype, args.device, args.seed)
    except UnavailableError as error:
        return {"missing": str(error)}
    true, scales = truth(inputs), Scales(args.device)
    sizes = (min(t, 2048), d, min(v, 16384))

    def rate(**options: Any) -> float:
        return gemm_rate(*sizes, dtype=dtype, device=args.device, repeats=3, **options)

    rate()  # its own buffers, and the threads, are there now
    results: dict[str, Any] = {"modes": {}, "sequence": inputs.sequence}
    yield
    for mode in PRODUCTS:
        of_mode = one_mode(mode, run, inputs, true, scales, args.runs, rate)
        for figures in tried(of_mode, args.runs + 2):
            results["modes"][mode] = figures
            yield
    if args.device == "cpu":
        rate(multiply=matmul)
        results["product_rate"] = rate(multiply=matmul)
    return results
