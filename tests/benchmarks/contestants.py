"""One contestant of a benchmark, in a process of its own: a training step, timed and weighed.

Every process builds the same policy and reference from the seed. The reference is the model as initialised,
the policy the same with a little noise on every weight, so that no log-ratio is zero. In
`tests/gpu/train_step.py` the same contestants share one process and the models.
"""

import importlib.util
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Generator
from copy import copy, deepcopy
from typing import Any, Literal

import torch
from lengths import Lengths
from measure import UnavailableError, can_weigh, forget_peak, gemm_rate, status
from torch import Tensor, nn

from dpo_wrapper import DPO, losses
from dpo_wrapper.batches import PreferenceBatch
from dpo_wrapper.cpu_matmul import matmul
from dpo_wrapper.prefix_tree.tree import PrefixTree

Step = Callable[[], Tensor]
Reference = nn.Module | Literal["copy", "adapter"]
BETA = 0.1


# models


def build(args: Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    if args.model == "qwen3.5" and args.contestant != "llama":
        return build_qwen(args)
    if args.model != "xt":
        return build_llama(
            vocab_size=args.vocab,
            hidden_size=args.dim,
            intermediate_size=args.dim * 11 // 4,
            num_hidden_layers=args.depth,
            num_attention_heads=args.dim // 64,
            tie_word_embeddings=False,
        )

    from x_transformers import Decoder, TransformerWrapper

    decoder = Decoder(
        dim=args.dim, depth=args.depth, heads=args.dim // 64, rotary_pos_emb=True, attn_flash=True
    )
    return TransformerWrapper(
        num_tokens=args.vocab, max_seq_len=4096, use_abs_pos_emb=False, attn_layers=decoder
    )


def build_llama(**config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    common = {"max_position_embeddings": 4096, "attn_implementation": "sdpa", "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**common | config))


def build_qwen(args: Namespace) -> nn.Module:
    """A Qwen 3.5 of the Llama's matrix sizes: keys and values of Gated DeltaNet are as wide as the model."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    heads = {"linear_num_key_heads": args.dim // 128, "linear_num_value_heads": args.dim // 128}
    config = Qwen3_5TextConfig(
        vocab_size=args.vocab,
        hidden_size=args.dim,
        intermediate_size=args.dim * 11 // 4,
        num_hidden_layers=args.depth,
        num_attention_heads=args.dim // 64,
        num_key_value_heads=args.dim // 64,
        head_dim=64,
        max_position_embeddings=4096,
        use_cache=False,
        **heads,
    )
    return Qwen3_5ForCausalLM(config)


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed + 1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype)
        parameter += 0.1 * parameter.std(correction=0) * noise


def head_of(model: nn.Module) -> nn.Module:
    return model.lm_head if hasattr(model, "lm_head") else model.to_logits  # type: ignore[return-value]


# batches


class Batch:
    """The pairs as every contestant's own collator would lay them."""

    def __init__(self, lengths: Lengths, vocab: int, seed: int, device: str = "cpu") -> None:
        self.chosen, self.rejected, self.prompts = lengths.ids(vocab, seed)
        self.device = device

    def without_shared_prefixes(self) -> "Batch":
        """Sequences as long, each with another first token, so that a tree of them has them side by side."""
        batch = copy(self)
        pairs = enumerate(zip(self.chosen, self.rejected, strict=True))
        rows = [([2 * k + 1, *chosen[1:]], [2 * k + 2, *rejected[1:]]) for k, (chosen, rejected) in pairs]
        batch.chosen, batch.rejected = map(list, zip(*rows, strict=True))
        return batch

    def side(self, rows: list[list[int]], width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, padded on the right with 0, and what of them is prompt, and what is real."""
        width = max(map(len, rows)) if width is None else width
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        place = torch.arange(width)
        prompt = place < torch.tensor(self.prompts)[:, None]
        real = place < torch.tensor([[len(row)] for row in rows])
        return ids.to(self.device), prompt.to(self.device), real.to(self.device)

    def counts(self) -> dict[str, int]:
        rows = self.chosen + self.rejected
        return {
            "padded": len(rows) * max(map(len, rows)),
            "real": sum(map(len, rows)),
            "unique": len(PrefixTree.from_sequences(rows).ids),
        }

    def flops(self, model: nn.Module, dim: int, depth: int) -> dict[str, float]:
        """Of the matrix products of one forward pass that computes each unique token once: every linear layer
        of the decoder, the causal half of both products in `depth` layers of attention, and the head where
        something is scored."""
        rows = [row[:-1] for row in self.chosen + self.rejected]  # a last token is never an input
        tree = PrefixTree.from_sequences(rows)
        head = head_of(model)
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
        paths = tree.path.split(tree.start.diff().tolist())
        scored = torch.cat([p[n - 1 :] for p, n in zip(paths, 2 * self.prompts, strict=True)]).unique()
        return {
            "linear": 2.0 * linear * len(tree.ids),
            "attention": 4.0 * dim * depth * float((tree.position + 1).sum()),
            "head": 2.0 * sum(p.numel() for p in head.parameters()) * len(scored),
        }


# contestants


def ours(
    model: nn.Module,
    batch: Batch,
    args: Namespace,
    share: str | bool,
    cached: bool = False,
    reference: Reference = "copy",
) -> Step:
    """`DPO`; if it makes the reference, the policy gets its noise afterwards."""
    loss = losses.SigmoidNorm(BETA) if args.model == "xt" else losses.Sigmoid(BETA)
    dpo = DPO(model, loss=loss, share_prefix=share, reference=reference)
    if reference == "copy":
        perturb(model, args.seed)
    sides = [batch.side(rows) for rows in (batch.chosen, batch.rejected)]
    chosen, rejected = (ids for ids, _, _ in sides)
    longest = max(sides, key=lambda side: side[0].shape[1])
    given: dict[str, Any] = {}

    def step() -> Tensor:
        loss = dpo(chosen, rejected, longest[1], (sides[0][2], sides[1][2]), **given)
        for scorer in [dpo.policy] if cached else [dpo.policy, dpo.reference.scorer]:  # type: ignore[attr-defined]
            assert (scorer.probe.why_padded is None) == bool(share), scorer.probe.why_padded
        return loss

    step.explain = dpo.explain  # type: ignore[attr-defined]
    if cached:
        prompts, reals = (tuple(side[k] for side in sides) for k in (1, 2))
        ready = PreferenceBatch.from_padded((chosen, rejected), prompts, reals)
        sums = dpo.reference(ready.sequences).sums
        given["ref_log_probs"] = sums[ready.pair_index].unbind(dim=1)
    return step


def x_transformers(model: nn.Module, batch: Batch, args: Namespace) -> Step:
    """Theirs takes both sides in one shape, and means over the answer's tokens (with its mask off by one)."""
    from x_transformers import dpo as library

    dpo = library.DPO(model, beta=BETA)
    perturb(model, args.seed)
    width = max(map(len, batch.chosen + batch.rejected))
    chosen, prompt, chosen_real = batch.side(batch.chosen, width)
    rejected, _, rejected_real = batch.side(batch.rejected, width)
    masks = {"preferred_seq_mask": chosen_real, "unpreferred_seq_mask": rejected_real}
    return lambda: dpo(chosen, rejected, prompt_mask=prompt, **masks)


def trl(
    model: nn.Module,
    batch: Batch,
    args: Namespace,
    checkpointing: bool = False,
    reference: Reference = "copy",
) -> Step:
    """`DPOTrainer.compute_loss` on what TRL's own collator makes of the tokens."""
    if importlib.util.find_spec("trl") is None:
        raise UnavailableError("not installed: pip install trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(prefix="dpo-benchmark-"),
        beta=BETA,
        loss_type=["sigmoid"],
        max_length=None,
        padding_free=False,
        disable_dropout=True,
        gradient_checkpointing=checkpointing,
        use_cpu=batch.device == "cpu",
        bf16=False,
        report_to=[],
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=deepcopy(model) if reference == "copy" else None if reference == "adapter" else reference,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "b"}]),
        processing_class=tokenizer,
    )
    if reference == "copy":
        perturb(model, args.seed)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    rows = zip(batch.chosen, batch.rejected, batch.prompts, strict=True)
    examples = [
        {"prompt_ids": chosen[:n], "chosen_ids": chosen[n:], "rejected_ids": rejected[n:]}
        for chosen, rejected, n in rows
    ]
    inputs = {name: value.to(batch.device) for name, value in trainer.data_collator(examples).items()}
    trainer.model.train()
    return lambda: trainer.compute_loss(trainer.model, inputs)


CONTESTANTS: dict[str, Callable[[nn.Module, Batch, Namespace], Step]] = {
    "tree": lambda m, b, a: ours(m, b, a, share="auto"),
    "cached": lambda m, b, a: ours(m, b, a, share="auto", cached=True),
    "plain": lambda m, b, a: ours(m, b, a, share=False),
    "llama": lambda m, b, a: ours(m, b, a, share="auto"),
    "trl": trl,
    "trl-checkpointing": lambda m, b, a: trl(m, b, a, checkpointing=True),
    "x-transformers": x_transformers,
}


# measuring


def measure(args: Namespace, lengths: Lengths) -> Generator[None, None, dict[str, Any]]:
    """What the contestant `args.contestant` needs, one step at a time; at last it is returned."""
    torch.set_num_threads(args.threads)
    model = build(args)
    batch = Batch(lengths, args.vocab, args.seed)
    try:
        step = CONTESTANTS[args.contestant](model, batch, args)
    except UnavailableError as error:
        return {"missing": str(error)}
    gemm_rate(), gemm_rate(multiply=matmul)  # their own buffers, and the threads, are there now

    weighs = can_weigh()
    before = status("VmRSS") if weighs else 0
    seconds, peaks, loss = [], [], torch.zeros(())
    rates: dict[str, list[float]] = {"gemm_rates": [], "product_rates": []}
    for run in range(args.runs + 1):
        model.zero_grad(set_to_none=True)
        rates["gemm_rates"].append(gemm_rate())
        rates["product_rates"].append(gemm_rate(multiply=matmul))
        if weighs:
            forget_peak()
        began = time.perf_counter()
        loss = step()
        loss.backward()
        took = time.perf_counter() - began
        if run:  # the first one warms up
            seconds.append(took)
            peaks.append(status("VmHWM") - before if weighs else 0)
        yield
    layer_types = getattr(getattr(model, "config", None), "layer_types", None)
    attention_layers = args.depth if layer_types is None else layer_types.count("full_attention")
    gradients = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    return {
        "seconds": statistics.median(seconds),
        "runs": seconds,
        "peak_mb": max(peaks) / 1e6 if weighs else None,
        "gradient_norm": float(torch.stack(gradients).norm()),
        "loss": float(loss.detach()),
        **rates,
        "tokens": batch.counts(),
        "forward_flops": batch.flops(model, args.dim, attention_layers),
        "torch": torch.__version__,
    }
