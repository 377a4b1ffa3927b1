"""Training steps of real shapes, for train_step.py and profile_step.py: model, trained part, and pairs."""

import gc
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from contestants import Batch, Reference, Step, build_llama, ours, perturb, trl
from lengths import SHAPES, lengths
from measure import UnavailableError, write_json
from torch import Tensor, nn

from dpo_wrapper.models import language_model
from dpo_wrapper.training.policy import find_compiled_layers

SEED = 150
ARGS = Namespace(model="llama", seed=SEED)  # what contestants ask for
VOCAB = 151_936


@dataclass(frozen=True)
class Size:
    """Of a Llama."""

    dim: int
    depth: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int = VOCAB


SIZES = {
    "0.5b": Size(896, 24, 14, 2, 4864),
    "1.5b": Size(1536, 28, 12, 2, 8960),
    "toy": Size(64, 1, 4, 2, 128, vocab=512),
}


@dataclass(frozen=True)
class Case:
    size: str
    tuning: str  # "full" or "lora"
    shape: str
    pairs: int

    def __str__(self) -> str:
        return f"{self.size}, {self.tuning}, {self.pairs} pairs of {self.shape}"


TOY_CASES = [Case("toy", "full", "hh", 2), Case("toy", "lora", "hh", 2)]


@dataclass
class Setup:
    """What the contestants of a case share."""

    case: Case
    model: Any
    reference: Reference
    batch: Batch
    optimizer: torch.optim.Optimizer
    device: str

    @cached_property
    def trl(self) -> Step:
        return trl(
            self.model, self.batch, ARGS, reference=self.reference
        )  # a second one would break the first

    def build_forward(self, name: str) -> Step:
        """The forward pass of a contestant, up to the loss."""
        if name.startswith("trl"):
            return self.trl
        batch = self.batch.without_shared_prefixes() if name == "packed" else self.batch
        share: str | bool = False if name == "plain" else "auto"
        return ours(self.model, batch, ARGS, share, reference=self.reference)

    def set_modes(self, name: str) -> None:
        """Train mode, which checkpointing asks for; these models have no dropout."""
        self.model.train()
        for parts, modules in self.compiled.items():
            for module in modules:
                if name.endswith(parts):
                    module.compile(dynamic=True)
                else:
                    module._compiled_call_impl = None
        if name.endswith("checkpointing"):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    @cached_property
    def compiled(self) -> dict[str, list[nn.Module]]:
        """By the end of a contestant's name, what is compiled of policy and reference."""
        models = [self.model] if isinstance(self.reference, str) else [self.model, self.reference]
        parts = [module for model in models for module in find_compiled_layers(model)]
        layers = [layer.module for model in models for layer in language_model(model).decoder_layers()]
        return {"compiled-parts": parts, "compiled-layers": layers}

    def train_step(self, forward: Step) -> Tensor:
        """A whole step; returns the loss."""
        loss = forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def flops(self) -> dict[str, float]:
        """Of one step, by part; see the module's docstring."""
        size = SIZES[self.case.size]
        forward = self.batch.flops(self.model, size.dim, size.depth)
        passes = {"linear": 3, "attention": 4, "head": 3} if self.case.tuning == "lora" else {}
        return {part: passes.get(part, 4) * flops for part, flops in forward.items()}


def set_up(case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> Setup:
    size = SIZES[case.size]
    torch.manual_seed(SEED)
    with torch.device(device), default_dtype(dtype):
        model: Any = build_llama(
            vocab_size=size.vocab,
            hidden_size=size.dim,
            intermediate_size=size.inner,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            tie_word_embeddings=True,
        )
    reference: Reference = "adapter"
    if case.tuning == "lora":
        model = add_lora(model)
    else:
        reference = deepcopy(model).requires_grad_(False)
        perturb(model, SEED)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=device == "cuda")
    batch = Batch(lengths(case.shape, case.pairs, SEED), size.vocab, SEED, device)
    return Setup(case, model, reference, batch, optimizer, device)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def add_lora(model: nn.Module) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UnavailableError("not installed: pip install peft") from None
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# options


def add_case_options(parser: ArgumentParser, defaults: str) -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=here, help="default, here: %(default)s")
    parser.add_argument("--toy", action="store_true", help="tiny models, which measure nothing")
    columns = ("SIZE", "TUNING", "SHAPE", "PAIRS")
    parser.add_argument("--case", nargs=4, action="append", metavar=columns, help=f"default: {defaults}")
    parser.add_argument("--seconds", type=float, help="begin no other case after so many")


def run_cases(
    args: Namespace, defaults: list[Case], run_case: Callable[[Case, Namespace], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The records of the chosen cases, written after each; a case for which there is no time is left out."""
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # trials and contestants have shapes and modes of their own
    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    records: list[dict[str, Any]] = []
    for case in chosen_cases(args, defaults):
        print(f"\n{case}", flush=True)
        if args.seconds and time.monotonic() - began > args.seconds:
            records.append({"case": asdict(case), "left_out": "no time"})
            print("no time")
        else:
            records.append(run_case(case, args))
            free_memory()
        if args.json:
            write_json(args, cases=records)
    return records


def chosen_cases(args: Namespace, defaults: list[Case]) -> list[Case]:
    if not args.case:
        return TOY_CASES if args.toy else defaults
    for size, tuning, shape, pairs in args.case:
        if size not in SIZES or tuning not in ("full", "lora") or shape not in SHAPES or not pairs.isdigit():
            choices = f"{'|'.join(SIZES)} full|lora {'|'.join(SHAPES)} PAIRS"
            raise SystemExit(f"--case should be {choices}, but it is {size} {tuning} {shape} {pairs}.")
    return [Case(size, tuning, shape, int(pairs)) for size, tuning, shape, pairs in args.case]
