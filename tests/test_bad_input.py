"""Bad input gets one sentence: what was expected, what came, the remedy. No model runs, nothing is lost."""

import dataclasses
import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from dpo_wrapper import DPO, IPO, SFT, Loss, PreferenceBatch, Sigmoid, sequence_log_probs, token_log_probs
from helpers.models import VOCAB, ZOO, PlainGRU, PlainTransformer, hf_llama

B, N, M = 2, 9, 7
CHOSEN, REJECTED = (torch.randint(0, VOCAB, (B, n), generator=Generator().manual_seed(n)) for n in (N, M))
PROMPT = torch.arange(N).expand(B, -1) < 2
REAL, REAL_REJECTED = (torch.ones(B, n, dtype=torch.bool) for n in (N, M))
SUMS = torch.tensor([-9.0, -7.0])
GOOD = {"preferred_seq": CHOSEN, "unpreferred_seq": REJECTED, "prompt_mask": PROMPT}
BATCH = PreferenceBatch.from_padded((CHOSEN, REJECTED), (PROMPT, PROMPT[:, :M]), (REAL, REAL_REJECTED))


class Bench:
    """A model that has been used, and what any model that it watches was run on."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.model = self.watched(ZOO["xt-absolute"](0))
        self.dpo = DPO(self.model)
        self.scored_mask = ~PROMPT
        self.first_loss = self.good_call()

    def watched(self, model: nn.Module) -> nn.Module:
        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self.seen.append((args[0] if args else kwargs["input_ids"]).flatten().tolist())

        model.register_forward_pre_hook(note, with_kwargs=True)
        return model

    def good_call(self) -> Tensor:
        loss = self.dpo(**GOOD)
        loss.backward()
        self.dpo.zero_grad()
        return loss.detach()


def holds_the_batch(ids: list[int]) -> bool:
    """Whether the first tokens of a preferred sequence stand somewhere in a row or in a tree."""
    needle = CHOSEN[0, :5].tolist()
    return any(ids[k : k + 5] == needle for k in range(len(ids)))


def test_what_a_model_runs_on_is_noticed():
    bench = Bench()
    assert any(map(holds_the_batch, bench.seen)) and not all(map(holds_the_batch, bench.seen))


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    act: Callable[[Bench], Any]
    error: type[Exception]
    sentence: str
    looks: bool = False  # whether the model is new, so that it may have been looked at


CASES: list[Case] = []


def bad_call(name: str, error: type[Exception], sentence: str, **changes: Any) -> None:
    """`dpo(...)` with some of its good arguments replaced."""
    CASES.append(Case(f"dpo(): {name}", lambda bench: bench.dpo(**GOOD | changes), error, sentence))


def bad_batch(name: str, error: type[Exception], sentence: str, batch: Any = BATCH, **beside: Any) -> None:
    CASES.append(Case(f"dpo(batch): {name}", lambda bench: bench.dpo(batch, **beside), error, sentence))


def bad_score(name: str, error: type[Exception], sentence: str, *args: Any, looks: bool = False) -> None:
    def act(bench: Bench) -> Any:
        model, seq, *masks = (bench.model if arg is None else arg for arg in args)
        return sequence_log_probs(model, seq, *masks)

    CASES.append(Case(f"sequence_log_probs(): {name}", act, error, sentence, looks))


def bad_option(name: str, error: type[Exception], sentence: str, **options: Any) -> None:
    """`DPO(model, ...)`; an option may be made from the model."""

    def act(bench: Bench) -> Any:
        made = {k: v(bench.model) if isinstance(v, type(lambda: 0)) else v for k, v in options.items()}
        return DPO(bench.model, **made)

    CASES.append(Case(f"DPO(): {name}", act, error, sentence))


def bad_model(
    name: str, error: type[Exception], sentence: str, make: Callable[[], Any], **options: Any
) -> None:
    """A model that is refused, at the latest on its first use; or, with `reference`, a reference that is."""

    def act(bench: Bench) -> Any:
        made = {k: v() if isinstance(v, type(lambda: 0)) else v for k, v in options.items()}
        model = make()
        for module in (model, *made.values()):
            if isinstance(module, nn.Module):
                bench.watched(module)
        return DPO(model, **made)(**GOOD)

    CASES.append(Case(f"model: {name}", act, error, sentence, looks=True))


# ids

NO_TENSOR = "should be an int tensor, but it is"
bad_call(
    "a list",
    TypeError,
    f"^preferred_seq {NO_TENSOR} a list of 2: use torch.tensor",
    preferred_seq=CHOSEN.tolist(),
)
bad_call(
    "an array", TypeError, f"^unpreferred_seq {NO_TENSOR} a ndarray: use", unpreferred_seq=REJECTED.numpy()
)
bad_call("nothing", TypeError, f"^preferred_seq {NO_TENSOR} None: use torch.tensor", preferred_seq=None)
bad_call("a dict", TypeError, f"^preferred_seq {NO_TENSOR} a dict", preferred_seq=GOOD)
bad_call(
    "float ids",
    TypeError,
    r"^preferred_seq should hold token ids \(int64\), but its dtype is torch.float32: use .long\(\)",
    preferred_seq=CHOSEN.float(),
)
bad_call(
    "float ids on the other side",
    TypeError,
    r"^unpreferred_seq should hold token ids .* torch.float16: use .long\(\)",
    unpreferred_seq=REJECTED.half(),
)
bad_call("bool ids", TypeError, r"dtype is torch.bool: is it a mask\?", preferred_seq=CHOSEN > 3)
SHAPE = r"should have shape \(b, n\), but its shape is"
bad_call(
    "one dimension", ValueError, rf"{SHAPE} \(9,\): for a single .* ids\[None\]", preferred_seq=CHOSEN[0]
)
bad_call(
    "three dimensions", ValueError, rf"^unpreferred_seq {SHAPE} \(1, 2, 7\)", unpreferred_seq=REJECTED[None]
)
bad_call(
    "no rows",
    ValueError,
    r"^preferred_seq should hold a row and a token, but its shape is \(0, 9\): leave such",
    preferred_seq=CHOSEN[:0],
    unpreferred_seq=REJECTED[:0],
    prompt_mask=PROMPT[:0],
)
bad_call(
    "no columns", ValueError, r"hold a row and a token, .* \(2, 0\): leave", unpreferred_seq=REJECTED[:, :0]
)
bad_call(
    "unequal batch sizes",
    ValueError,
    "^each preferred_seq needs an unpreferred_seq, but there are 2 and 1",
    unpreferred_seq=REJECTED[:1],
)
bad_call(
    "no unpreferred_seq",
    TypeError,
    r"^unpreferred_seq is missing: call dpo\(preferred_seq, unpreferred_seq, prompt_mask\)",
    unpreferred_seq=None,
)
bad_call(
    "ids on meta",
    ValueError,
    "^preferred_seq is on the meta device.*move it",
    preferred_seq=CHOSEN.to("meta"),
)
bad_call(
    "rejected ids on meta", ValueError, "^unpreferred_seq is on the meta", unpreferred_seq=REJECTED.to("meta")
)

# ids of the vocabulary


def with_id(value: int, place: int = 1) -> Tensor:
    return CHOSEN.index_fill(1, torch.tensor([place % N]), value)


OUTSIDE = r"^token ids should be in \[0, 37\), the model's vocabulary, but one is"
REMEDY = r"is the tokenizer the model's own, and is padding masked \(pad_id or seq_mask\)\?$"
bad_call("a negative id", ValueError, f"{OUTSIDE} -1: {REMEDY}", preferred_seq=with_id(-1))
bad_call(
    "an id that is the vocabulary's size", ValueError, f"{OUTSIDE} 37: {REMEDY}", preferred_seq=with_id(37)
)
bad_call("the same, as the last target only", ValueError, f"{OUTSIDE} 37:", preferred_seq=with_id(37, -1))
bad_call(
    "padding that is not masked", ValueError, f"{OUTSIDE} -100: {REMEDY}", preferred_seq=with_id(-100, -1)
)
bad_call("an id beyond 32 bits", ValueError, f"{OUTSIDE} 1099511627776:", preferred_seq=with_id(2**40))
bad_call(
    "padding that is not masked on the other side",
    ValueError,
    f"{OUTSIDE} -100:",
    unpreferred_seq=REJECTED.index_fill(1, torch.tensor([M - 1]), -100),
    preferred_seq_mask=REAL,
)
bad_call(
    "more tokens than positions",
    ValueError,
    "^a sequence has 29 tokens before its last, but the model's table of positions ends at 24: shorten",
    preferred_seq=CHOSEN.repeat(1, 4)[:, :30],
    prompt_mask=PROMPT.repeat(1, 4)[:, :30],
)

# masks

bad_call(
    "no prompt_mask", TypeError, "^prompt_mask is missing: give a bool mask, True on prompt", prompt_mask=None
)
DTYPE = r"should be bool, but its dtype is torch.int64: use .bool\(\)"
bad_call("an int prompt mask", TypeError, f"^prompt_mask {DTYPE}", prompt_mask=PROMPT.long())
bad_call(
    "an int mask in a tuple", TypeError, rf"^prompt_mask\[1\] {DTYPE}", prompt_mask=(PROMPT, PROMPT.long())
)
bad_call(
    "a list as mask",
    TypeError,
    r"^prompt_mask\[0\] should be a bool tensor, but it is a list of 9: use",
    prompt_mask=PROMPT.tolist(),
)
bad_call(
    "an int as mask", TypeError, "^prompt_mask should be a bool tensor, but it is a int: use", prompt_mask=2
)
LIKE = r"should have the shape of preferred_seq, \(2, 9\), but its shape is"
BOTH = "one mask serves both sides if it is as wide as the wider, else give a tuple of two"
bad_call("too narrow", ValueError, rf"^prompt_mask {LIKE} \(2, 7\): {BOTH}", prompt_mask=PROMPT[:, :M])
bad_call("too wide", ValueError, rf"{LIKE} \(2, 10\): {BOTH}", prompt_mask=torch.zeros(B, N + 1).bool())
bad_call("too few rows", ValueError, rf"{LIKE} \(1, 9\): {BOTH}", prompt_mask=PROMPT[:1])
bad_call("no rows dimension", ValueError, rf"{LIKE} \(9,\): {BOTH}", prompt_mask=PROMPT[0])
ONE_OR_TWO = "^prompt_mask should be one mask or a tuple of two, but it is a tuple of"
bad_call("a tuple of one", ValueError, f"{ONE_OR_TWO} 1", prompt_mask=(PROMPT,))
bad_call("a tuple of three", ValueError, f"{ONE_OR_TWO} 3", prompt_mask=(PROMPT,) * 3)
ORDER = "the tuple holds the mask of preferred_seq, then that of unpreferred_seq"
bad_call(
    "a tuple whose second is wrong",
    ValueError,
    rf"^prompt_mask\[1\] .* unpreferred_seq, \(2, 7\), but its shape is \(2, 9\): {ORDER}",
    prompt_mask=(PROMPT, PROMPT),
)
bad_call(
    "a tuple the wrong way round",
    ValueError,
    rf"^prompt_mask\[0\] {LIKE} \(2, 7\): {ORDER}",
    prompt_mask=(PROMPT[:, :M], PROMPT),
)
bad_call(
    "a mask for one side only",
    TypeError,
    r"^prompt_mask\[1\] .* but it is None: use",
    prompt_mask=(PROMPT, None),
)
bad_call(
    "prompt mask on meta",
    ValueError,
    "^prompt_mask is on meta but .* cpu: move",
    prompt_mask=PROMPT.to("meta"),
)
bad_call("an int seq_mask", TypeError, f"^seq_mask {DTYPE}", seq_mask=REAL.long())
bad_call("seq_mask too narrow", ValueError, rf"^seq_mask {LIKE} \(2, 7\): {BOTH}", seq_mask=REAL_REJECTED)
bad_call(
    "seq_mask on meta",
    ValueError,
    "^seq_mask is on meta but preferred_seq is on cpu",
    seq_mask=REAL.to("meta"),
)
bad_call(
    "padding masked twice",
    ValueError,
    "^give either seq_mask or preferred_seq_mask and unpreferred_seq_mask, not both",
    seq_mask=REAL,
    unpreferred_seq_mask=REAL_REJECTED,
)
bad_call(
    "a side's mask of the other side's shape",
    ValueError,
    rf"^preferred_seq_mask {LIKE} \(2, 7\): give one value for each token",
    preferred_seq_mask=REAL_REJECTED,
)
bad_call(
    "a side's mask of floats",
    TypeError,
    r"^unpreferred_seq_mask should be bool, but its dtype is torch.float32: use .bool\(\)",
    unpreferred_seq_mask=REAL_REJECTED.float(),
)

# reference log-probs

PAIR = r"^ref_log_probs should be a tuple \(chosen, rejected\) of tensors of shape \(2,\), but it is"
bad_call("one tensor", TypeError, f"{PAIR} a Tensor: give what sequence_log_probs", ref_log_probs=SUMS)
bad_call("a tuple of three sums", TypeError, f"{PAIR} a tuple of 3", ref_log_probs=(SUMS,) * 3)
bad_call(
    "a sum a token",
    ValueError,
    r"^ref_log_probs for rejected should have shape \(2,\), one per pair, but its shape is \(2, 7\)",
    ref_log_probs=(SUMS, torch.zeros(B, M)),
)
FLOATS = r"^ref_log_probs for chosen should be a float tensor, one per pair, but it is"
bad_call("whole sums", TypeError, f"{FLOATS} torch.int64", ref_log_probs=(SUMS.long(), SUMS))
bad_call("lists of sums", TypeError, f"{FLOATS} a list of 2", ref_log_probs=(SUMS.tolist(), SUMS.tolist()))
bad_call(
    "sums with a gradient",
    ValueError,
    r"^ref_log_probs for rejected should have no gradient, but it requires one: .detach\(\) it",
    ref_log_probs=(SUMS, SUMS.clone().requires_grad_()),
)
bad_call(
    "sums that are no numbers",
    ValueError,
    "^ref_log_probs for chosen should be finite, but one is not: correct or leave out that pair",
    ref_log_probs=(SUMS * math.nan, SUMS),
)
bad_call(
    "sums on meta",
    ValueError,
    "^ref_log_probs for rejected is on meta but the batch is on cpu: move one of them",
    ref_log_probs=(SUMS, SUMS.to("meta")),
)

# ready-made batches

ALONE = "^a PreferenceBatch holds ids, masks and weights already: give it alone"
bad_batch("and ids", TypeError, ALONE, unpreferred_seq=REJECTED)
bad_batch("and a mask", TypeError, ALONE, preferred_seq_mask=REAL)
bad_batch("in a list", TypeError, f"^preferred_seq {NO_TENSOR} a list of 1", [BATCH])
bad_batch(
    "pairs of another batch",
    ValueError,
    r"^pair_index should hold indices in \[0, 4\), .* reach from 4 to 7: index into this batch alone",
    dataclasses.replace(BATCH, pair_index=BATCH.pair_index + 4),
)
bad_batch(
    "negative pairs",
    ValueError,
    "reach from -1 to 2",
    dataclasses.replace(BATCH, pair_index=BATCH.pair_index - 1),
)
bad_batch(
    "sums of another batch",
    ValueError,
    r"^ref_log_probs for chosen should have shape \(2,\), one per pair, but its shape is \(1,\)",
    ref_log_probs=(SUMS[:1], SUMS[:1]),
)

# sequence_log_probs; None stands for the model

bad_score("a list", TypeError, f"^seq {NO_TENSOR} a list", None, CHOSEN.tolist(), ~PROMPT)
bad_score("the model second", TypeError, f"^seq {NO_TENSOR} a TransformerWrapper", CHOSEN, None, ~PROMPT)
bad_score(
    "float ids", TypeError, r"^seq should hold token ids .*: use .long\(\)", None, CHOSEN.float(), ~PROMPT
)
bad_score(
    "one row", ValueError, rf"^seq {SHAPE} \(9,\): for a single .* ids\[None\]", None, CHOSEN[0], ~PROMPT[0]
)
bad_score("an int mask", TypeError, f"^scored_mask {DTYPE}", None, CHOSEN, PROMPT.long())
bad_score(
    "a narrow mask",
    ValueError,
    r"^scored_mask should have the shape of seq, \(2, 9\), but its shape is \(2, 7\): give one value",
    None,
    CHOSEN,
    ~PROMPT[:, :M],
)
bad_score("an int seq_mask", TypeError, f"^seq_mask {DTYPE}", None, CHOSEN, ~PROMPT, REAL.long())
bad_score("an id outside", ValueError, f"{OUTSIDE} 37: {REMEDY}", None, with_id(37), ~PROMPT, looks=True)
bad_score(
    "a name as model",
    TypeError,
    "^a model should be a torch.nn.Module, but it is a str: load or build it.",
    "gpt2",
    CHOSEN,
    ~PROMPT,
)

# options of DPO

for beta in (0, -0.1, math.nan, math.inf, True, "0.1", None, torch.tensor(0.1)):
    received = re.escape(repr(beta))
    bad_option(f"beta {beta!r}", ValueError, f"beta should be positive, but it is {received}", beta=beta)
bad_option("beta below 0 beside a loss", ValueError, "^beta should be a positive number", beta=-1, loss=SFT())
bad_option(
    "beta beside a loss with another",
    ValueError,
    "^beta = 0.3 has no effect beside a loss with beta = 0.2: give it to the loss alone",
    beta=0.3,
    loss=IPO(0.2),
)
bad_option(
    "beta beside a loss without one",
    ValueError,
    "^beta = 0.3 has no effect beside a loss without one: leave it out",
    beta=0.3,
    loss=SFT(),
)
LOSS = r"^loss should be one of dpo_wrapper.losses, a function or a list of \(loss, weight\), but it is"
bad_option("a loss by name", TypeError, f"{LOSS} 'sigmoid'", loss="sigmoid")
bad_option("a module as loss that is none", TypeError, f"{LOSS} 3", loss=3)
bad_option("a class of losses", TypeError, rf"{LOSS} <class .*Sigmoid'>: write Sigmoid\(\)", loss=Sigmoid)
bad_option("no losses", TypeError, rf"{LOSS} \[\]", loss=[])
HOLDS = r"^a combined loss should be a list of \(loss, weight\), but it holds"
bad_option("a list of classes", TypeError, rf"{HOLDS} \(<class .*Sigmoid'>, 1.0\)", loss=[(Sigmoid, 1.0)])
bad_option("losses without weights", TypeError, rf"{HOLDS} SFT\(\)", loss=[SFT()])
for weight in (0, -1.0, math.nan, math.inf, True, "1"):
    bad_option(
        f"weight {weight!r}",
        ValueError,
        f"^the weight of SFT should be positive, but it is {weight!r}",
        loss=[(Sigmoid(), 1.0), (SFT(), weight)],
    )
KINDS = "^reference should be a module or one of auto, copy, adapter, none, but it is"
bad_option("an unknown reference", ValueError, f"{KINDS} 'frozen'", reference="frozen")
bad_option("a reference that is None", ValueError, f"{KINDS} None", reference=None)
A_CLASS = f"{KINDS} <class 'helpers.models.PlainGRU'>"
bad_option("a class as reference", ValueError, A_CLASS, reference=PlainGRU)
SHARES = "shares trained parameters with the policy and would follow it: use reference = 'copy'"
bad_option("the policy as reference", ValueError, SHARES, reference=lambda model: model)
bad_option("a wrapped policy as reference", ValueError, SHARES, reference=lambda model: nn.Sequential(model))


def sharing_its_head(model: nn.Module) -> nn.Module:
    other = ZOO["xt-absolute"](1)
    other.to_logits = model.to_logits
    return other


bad_option("a reference with the policy's head", ValueError, SHARES, reference=sharing_its_head)
FRESH = "^reference = 'adapter' switches a fresh PEFT LoRA adapter off, but this policy has none, or .*'copy'"
bad_option("'adapter' without PEFT", ValueError, FRESH, reference="adapter")
for value in ("yes", 1, None, torch.ones(2)):
    received = re.escape(repr(value))
    bad_option(
        f"share_prefix {value!r}",
        ValueError,
        f"^share_prefix should be 'auto', True or False, but it is {received}",
        share_prefix=value,
    )
IMPLS = "^impl should be one of auto, triton, chunked, eager, but it is"
bad_option("an unknown implementation", ValueError, f"{IMPLS} 'cuda'", log_prob_impl="cuda")
bad_option("an implementation that is None", ValueError, f"{IMPLS} None", log_prob_impl=None)


def bad_gather(name: str, sentence: str, **options: Any) -> None:
    """`token_log_probs(...)` with an option."""
    hidden, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)

    def act(_: Bench) -> Any:
        return token_log_probs(hidden, torch.zeros(5, 4), targets, **options)

    CASES.append(Case(f"token_log_probs(): {name}", act, ValueError, sentence))


OF_EXTRAS = "^extras should be a list of names from entropy, log_sum_p2, top1, greedy, but it is"
bad_gather("unknown extras", rf"{OF_EXTRAS} \['top5'\]", extras=["top5"])
bad_gather("extras as a string", f"{OF_EXTRAS} 'entropy'", extras="entropy")
if find_spec("triton") is not None:
    bad_gather(
        "triton on the CPU",
        "^tensors should be on CUDA for impl = 'triton', but they are on cpu: use 'auto'",
        impl="triton",
    )
for value in (0.0, True, "<pad>", torch.tensor(0)):
    received = re.escape(repr(value))
    bad_option(
        f"pad_id {value!r}",
        TypeError,
        f"^pad_id should be an integer or None, but it is {received}",
        pad_id=value,
    )
bad_option(
    "disable_dropout 'no'",
    TypeError,
    "^disable_dropout should be True or False, but it is 'no'",
    disable_dropout="no",
)

# models

NO_MODULE = "^a model should be a torch.nn.Module, but it is"
bad_model("a name", TypeError, f"{NO_MODULE} a str: load or build it.", lambda: "gpt2")
bad_model("nothing", TypeError, f"{NO_MODULE} None", lambda: None)
bad_model("a class", TypeError, f"{NO_MODULE} a type", lambda: PlainGRU)
bad_model("a function", TypeError, f"{NO_MODULE} a function", lambda: lambda ids: ids)


def x_encoder() -> nn.Module:
    from x_transformers import Encoder, TransformerWrapper

    return TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=24, attn_layers=Encoder(dim=16, depth=1, heads=2, verbose=False)
    )


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.body = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.body(x, x))


class Answering(nn.Module):
    """A causal model with something done to its logits."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.change = PlainTransformer(), change

    def forward(self, ids: Tensor) -> Any:
        return self.change(self.body(ids))


AHEAD = "^the model should be autoregressive, but changing a token changes the logits before it: use a causal"
bad_model("an encoder of x-transformers", ValueError, AHEAD, x_encoder)
bad_model("nn.Transformer without a mask", ValueError, AHEAD, Bidirectional)
bad_model("an encoder as reference", ValueError, AHEAD, PlainTransformer, reference=lambda: Bidirectional())
LOGITS = "^the model should return logits, a float tensor or an output with .logits, but it returns"
HEADED = r"give one with a language-model head \(AutoModelForCausalLM\), or wrap it"
bad_model(
    "a tuple returned", TypeError, f"{LOGITS} a tuple of 2: {HEADED}", lambda: Answering(lambda x: (x, None))
)
bad_model(
    "a dict returned", TypeError, f"{LOGITS} a dict: {HEADED}", lambda: Answering(lambda x: {"logits": x})
)
bad_model("nothing returned", TypeError, f"{LOGITS} None", lambda: Answering(lambda x: None))
bad_model("ids returned", TypeError, f"{LOGITS} torch.int64", lambda: Answering(lambda x: x.argmax(-1)))
WANTED = (
    r"^the model should return logits of shape \(b, n, v\), for ids of shape \(4, 8\), but their shape is"
)
bad_model("a loss returned", TypeError, rf"{WANTED} \(\): wrap it", lambda: Answering(Tensor.mean))
bad_model("the last logits only", TypeError, rf"{WANTED} \(4, 37\)", lambda: Answering(lambda x: x[:, -1]))
bad_model(
    "logits, time first", TypeError, rf"{WANTED} \(8, 4, 37\)", lambda: Answering(lambda x: x.transpose(0, 1))
)
bad_model("logits cut short", TypeError, rf"{WANTED} \(4, 7, 37\)", lambda: Answering(lambda x: x[:, 1:]))
bad_model(
    "logits that are no numbers",
    ValueError,
    r"^the model's logits should be numbers, but they are NaN: are its weights loaded, .*\?",
    lambda: Answering(lambda x: x * math.nan),
)
bad_model(
    "a module that takes no ids",
    TypeError,
    r"^the model should take ids of shape \(b, n\) .*given \(4, 8\) it raised Runtime.*wrap",
    lambda: nn.Linear(5, 5),
)
bad_model(
    "a DPO",
    TypeError,
    "^the model should take ids .* raised TypeError .unpreferred_seq",
    lambda: DPO(PlainGRU()),
)


def x_decoder(decoder: dict | None = None, **kwargs: Any) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=1, heads=2, verbose=False, **(decoder or {}))
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=24, attn_layers=layers, **kwargs)


bad_model(
    "a decoder that wants a context",
    TypeError,
    "^the model should take ids .* it raised AssertionError .context must be passed in",
    lambda: x_decoder({"cross_attend": True}),
)
bad_model(
    "a decoder without a head",
    TypeError,
    "^the model should have an output head, but it returns embeddings: leave return_only_embed at False",
    lambda: x_decoder(return_only_embed=True),
)
bad_model(
    "a model on another device",
    ValueError,
    "^the model is on meta but the ids are on cpu: move one|^the model's logits are on meta .*cpu: move",
    lambda: PlainGRU().to("meta"),
)
bad_model(
    "a reference on another device",
    ValueError,
    "on meta but the ids (are )?on cpu: move",
    PlainGRU,
    reference=lambda: PlainGRU().to("meta"),
)
ENDS = "tokens before its last, but the model's table of positions ends at"


def short_xt() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=1, heads=2, verbose=False)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=6, attn_layers=layers)


def short_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=7, n_embd=16, n_layer=1, n_head=2))


def short_opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 5}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCAB, **sizes, **heads))


def short_gptj() -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM

    return GPTJForCausalLM(
        GPTJConfig(vocab_size=VOCAB, n_positions=6, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    )


bad_model("x-transformers' table of positions", ValueError, f"^a sequence has 8 {ENDS} 6: shorten", short_xt)
bad_model("GPT-2's table of positions", ValueError, f"^a sequence has 8 {ENDS} 7: shorten", short_gpt2)
bad_model("OPT's table of positions", ValueError, f"^a sequence has 8 {ENDS} 5: shorten", short_opt)
bad_model("GPT-J's table of angles", ValueError, f"^a sequence has 8 {ENDS} 6: shorten", short_gptj)
bad_model(
    "a reference's table", ValueError, f"8 {ENDS} 7: shorten", lambda: hf_llama(0), reference=short_gpt2
)
OTHER = "tokens but the policy one of 37: give a reference with the policy's tokenizer"
for size in (30, 50):
    bad_model(
        f"a reference of {size} tokens",
        ValueError,
        f"^the reference has a vocabulary of {size} {OTHER}",
        PlainGRU,
        reference=lambda size=size: PlainGRU(size),
    )
bad_model(
    "a Hugging Face reference of 64 tokens",
    ValueError,
    f"^the reference has a vocabulary of 64 {OTHER}",
    lambda: hf_llama(0),
    reference=lambda: hf_llama(0, vocab_size=64),
)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


ENCODES = "^the model should be decoder-only, but T5ForConditionalGeneration has an encoder: load .*CausalLM"
bad_model("an encoder-decoder", TypeError, ENCODES, t5)
bad_model(
    "a model without its head",
    TypeError,
    f"{LOGITS} a BaseModelOutput.*: {HEADED}",
    lambda: hf_llama(0).model,
)


def lora(trained: str = "", **kwargs: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **kwargs)
    model = peft.get_peft_model(hf_llama(0), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained and trained in name:
                parameter += 0.1
    return model


bad_model("'adapter' that is trained", ValueError, FRESH, lambda: lora("lora_B"), reference="adapter")
bad_model(
    "'adapter' and a head that trains",
    ValueError,
    FRESH,
    lambda: lora(modules_to_save=["lm_head"]),
    reference="adapter",
)
bad_model(
    "'adapter' with magnitudes",
    ValueError,
    FRESH,
    lambda: lora("magnitude", use_dora=True),
    reference="adapter",
)


class CopiesNothing(PlainGRU):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        return self


class CopiesAfresh(PlainGRU):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        return CopiesAfresh()


NO_COPY = "^the model's own __deepcopy__ gives no copy with the same weights: give a separately built model"
bad_model("a copy that is the model", ValueError, NO_COPY, CopiesNothing)
bad_model("a copy with other weights", ValueError, NO_COPY, CopiesAfresh)


class Abstract(Loss):
    pass


CASES.append(Case("Loss: one without a formula", lambda _: Abstract(), TypeError, "abstract.*__call__"))


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()  # which each case leaves as it was


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, bench: Bench):
    modes = [(module, module.training) for module in bench.model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in bench.model.parameters()]

    for _ in range(2):  # the second time no worse than the first
        bench.seen.clear()
        with pytest.raises(case.error, match=case.sentence) as caught:
            case.act(bench)
        assert type(caught.value) is case.error
        assert not any(map(holds_the_batch, bench.seen)), "no model has run on the batch"
        assert case.looks or not bench.seen, "no model has run at all"
        assert re.fullmatch(r"[^\n]+[.?]|.*abstract.*", str(caught.value)), "one sentence"

    assert all(module.training == mode for module, mode in modes)
    assert all(parameter.requires_grad == trained for parameter, trained in trains)
    assert bench.good_call() == bench.first_loss


def test_names_of_cases_differ():
    assert len({case.name for case in CASES}) == len(CASES) >= 45
