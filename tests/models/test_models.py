"""Models as they come: families, adapters, closures, dtypes, wrappers."""

import copy
import functools
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations, prune

from dpo_wrapper import DPO, PreferenceBatch
from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.models.eval_mode import disable_dropout, reproducible_forward
from dpo_wrapper.scoring.scorer import Scorer
from helpers.batches import random_batch
from helpers.dpo_calls import LN2, arguments, nudged
from helpers.models import CONTEXT, DIM, VOCAB, ZOO, PlainGRU, hf_llama, randomise_, seeded

CASE = random_batch(Generator().manual_seed(0), b=3, odd=0)
ARGUMENTS = arguments(CASE)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids[None])
    return getattr(out, "logits", out)[0].float()


def naive_sums(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Of chosen and rejected, row by row, from full logits of the real tokens alone."""
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
    p_w, p_l = naive_sums(model)
    with torch.no_grad():
        r_w, r_l = naive_sums(reference)
    return -F.logsigmoid(0.1 * ((p_w - r_w) - (p_l - r_l))).mean()


def of_reference(dpo: DPO) -> tuple[float, float]:
    metrics = dpo(**ARGUMENTS, return_metrics=True)[1]
    return metrics["logps/ref_chosen"].item(), metrics["logps/ref_rejected"].item()


def train(dpo: DPO, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in dpo.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        dpo(**ARGUMENTS).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_reference_stays(dpo: DPO) -> None:
    """It starts where the policy does and is bit-identical when the policy has moved away."""
    assert abs(dpo(**ARGUMENTS).item() - LN2) < 1e-6
    before = of_reference(dpo)
    train(dpo)
    assert of_reference(dpo) == before
    assert abs(dpo(**ARGUMENTS).item() - LN2) > 1e-5


# families of transformers

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 2 * DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
STATE_SPACE = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "state_size": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4}),
    "mamba": ("Mamba", STATE_SPACE),
    "mamba2": ("Mamba2", STATE_SPACE | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    "mistral, window 3": ("Mistral", SIZES | {"sliding_window": 3}),
    "mistral, window 3, eager": ("Mistral", SIZES | {"sliding_window": 3, "attn_implementation": "eager"}),
    "qwen2": ("Qwen2", SIZES),
    "cohere": ("Cohere", SIZES | {"logit_scale": 0.3}),
    "granite": ("Granite", SIZES | {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "gemma3": ("Gemma3", SIZES | {"head_dim": 8, "sliding_window": 3, "final_logit_softcapping": 3.0}),
    "recurrent gemma": (
        "RecurrentGemma",
        {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
        | {"num_hidden_layers": 3, "lru_width": DIM, "attention_window_size": 4, "logits_soft_cap": 3.0},
    ),
    "gptj": ("GPTJ", {"vocab_size": VOCAB, "n_embd": DIM, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
}


def of_family(name: str) -> nn.Module:
    import transformers

    family, config = FAMILIES[name]
    kind = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    with seeded(0):
        return randomise_(getattr(transformers, f"{family}ForCausalLM")(kind(**config)), std=0.2)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers_equal_their_full_logits(name):
    reference = of_family(name).eval()
    dpo = DPO(of_family(name))
    policy = nudged(dpo.policy_model)
    loss = dpo(**ARGUMENTS)
    loss.backward()
    assert dpo.score_policy.head_applies and dpo.score_reference.head_applies
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    dpo.zero_grad()
    expected = naive_loss(policy, reference)
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    for name, p in policy.named_parameters():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        got = torch.zeros_like(p) if gradients[name] is None else gradients[name]
        assert torch.allclose(got, wanted, atol=1e-5, rtol=1e-3), name


class Outside(PlainGRU):
    """Looks like a Hugging Face model; its logits are those of its head, with something done to them."""

    def __init__(self, change: Callable[["Outside", Tensor], Tensor]) -> None:
        super().__init__()
        self.config, self.change = type("Config", (), {})(), change
        self.extra = nn.Parameter(torch.zeros(VOCAB))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    @property
    def base_model(self) -> Callable[..., Any]:
        return lambda input_ids: type("Output", (), {"last_hidden_state": self.rnn(self.embed(input_ids))[0]})

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.change(self, super().forward(input_ids))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda model, logits: logits, None),
        (lambda model, logits: 1.5 * logits, "its head alone gives other logits"),
        (lambda model, logits: logits + model.extra, "its head alone leaves out trained parameters"),
        (lambda model, logits: logits[..., :36], r"its head gives logits of shape \(2, 5, 37\) instead"),
    ],
    ids=["nothing", "scaled", "a bias that starts at 0", "cut"],
)
def test_a_head_is_used_alone_only_if_that_changes_nothing(change, reason):
    with seeded(0):
        dpo = DPO(Outside(change))
    arguments = ARGUMENTS | {k: ARGUMENTS[k] % 36 for k in ("preferred_seq", "unpreferred_seq")}
    if reason is None:
        dpo(**arguments)
    else:
        with pytest.warns(
            UserWarning, match=f"all logits of the Hugging Face model are computed, for {reason}"
        ):
            dpo(**arguments).backward()
        assert reason.endswith("parameters") == bool(dpo.policy_model.extra.grad is not None)
    assert dpo.score_policy.head_applies == (reason is None)


@pytest.mark.parametrize("masked", [float("-inf"), torch.finfo(torch.float32).min])
def test_tokens_masked_out_of_the_vocabulary_do_not_hide_a_model_that_sees_ahead(masked):
    class Masked(nn.Module):
        def __init__(self, ahead: bool) -> None:
            super().__init__()
            self.inner, self.ahead = PlainGRU(), ahead

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.inner(ids.flip(-1)).flip(-2) if self.ahead else self.inner(ids)
            return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], masked)], dim=-1)

    arguments = ARGUMENTS | {k: ARGUMENTS[k] % 36 for k in ("preferred_seq", "unpreferred_seq")}
    assert abs(DPO(Masked(False))(**arguments).item() - LN2) < 1e-6
    with pytest.raises(ValueError, match="should be autoregressive"):
        DPO(Masked(True))(**arguments)


# what deepcopy leaves behind


class Tied(nn.Module):
    """A model whose head is made by `make` and reads the embedding in a roundabout way."""

    def __init__(self, make: Callable[["Tied"], Any]) -> None:
        super().__init__()
        self.e = nn.Embedding(VOCAB, 8)
        self.linear = nn.Linear(8, VOCAB)
        self.head = make(self)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.e(ids))

    def method(self, x: Tensor, times: float = 1.0) -> Tensor:
        return times * x @ self.e.weight.T


class Box:
    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.held.e.weight.T


def recursive(model: Tied) -> Callable[..., Tensor]:
    def even(x: Tensor, n: int = 2) -> Tensor:
        return x @ model.e.weight.T if n == 0 else odd(x, n - 1)

    def odd(x: Tensor, n: int) -> Tensor:
        return even(x, n)

    return even


def with_keyword(model: Tied) -> Callable[..., Tensor]:
    def head(x: Tensor, *, weight: Tensor = model.e.weight) -> Tensor:
        return x @ weight.T

    return head


def hooked(model: Tied) -> nn.Module:
    model.linear.register_forward_hook(lambda module, args, out: out + model.e.weight.sum())
    return model.linear


def patched(model: Tied) -> nn.Module:
    forward = model.linear.forward
    model.linear.forward = lambda x: forward(x) + model.e.weight.sum()
    return model.linear


def in_containers(model: Tied) -> Callable[..., Tensor]:
    model.held = {"heads": [(functools.partial(model.method, times=2.0), lambda x: x @ model.e.weight.T)]}
    return lambda x: model.held["heads"][0][0](x) + model.held["heads"][0][1](x)


def reparametrised(model: Tied, how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return how(model.linear)


HEADS: dict[str, Callable[[Tied], Any]] = {
    "method": lambda model: model.method,
    "partial of a method": lambda model: functools.partial(model.method, times=2.0),
    "functions that call each other": recursive,
    "default of an argument": lambda model: lambda x, weight=model.e.weight: x @ weight.T,
    "default of a keyword": with_keyword,
    "hook": hooked,
    "forward replaced": patched,
    "containers": in_containers,
    "object": Box,
    "weight_norm": functools.partial(reparametrised, how=parametrizations.weight_norm),
    "spectral_norm": functools.partial(reparametrised, how=parametrizations.spectral_norm),
    "orthogonal": functools.partial(reparametrised, how=parametrizations.orthogonal),
    "weight_norm of old": functools.partial(reparametrised, how=torch.nn.utils.weight_norm),
    "pruned": functools.partial(
        reparametrised, how=lambda linear: prune.random_unstructured(linear, "weight", 0.3)
    ),
}


@pytest.mark.pitfall(4)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("head", HEADS)
def test_a_copy_reads_nothing_of_the_original(head):
    with seeded(0):
        check_reference_stays(DPO(Tied(HEADS[head])))


def in_object(model: Tied) -> Callable[..., Tensor]:
    box = Box(model)
    box.head = lambda x: x @ model.e.weight.T
    model.box = box
    return lambda x: model.box.head(x)


OUT_OF_REACH: dict[str, Callable[[Tied], Any]] = {
    "function in an object": in_object,
    "object in a function": lambda model: (lambda box: lambda x: box(x))(Box(model)),
    "cache": lambda model: functools.lru_cache(maxsize=None)(lambda x: x @ model.e.weight.T),
    "weak reference": lambda model: (lambda ref: lambda x: x @ ref().e.weight.T)(weakref.ref(model)),
    "class": lambda model: type("Head", (nn.Module,), {"forward": lambda self, x: x @ model.e.weight.T})(),
}


@pytest.mark.parametrize("head", OUT_OF_REACH)
def test_a_copy_that_would_read_the_original_is_refused(head):
    dpo = DPO(Tied(OUT_OF_REACH[head]))
    with pytest.raises(ValueError, match="would follow the policy: give a separately built model"):
        dpo(**ARGUMENTS)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["xt-tied", "xt-alibi", "hf-llama-tied"])
def test_a_copy_of_a_dpo_is_independent_of_it(name, used):
    """x-transformers' tied head is a closure: in the copy, the policy's own forward reads its own weights."""
    dpo = DPO(ZOO[name](0))
    if used:
        dpo(**ARGUMENTS)
    nudged(dpo.policy_model, 0.1)
    twin = copy.deepcopy(dpo)
    expected = dpo(**ARGUMENTS)
    logits = logits_of(twin.policy_model, CASE.preferred_seq[0])
    nudged(dpo.policy_model, 0.5)
    assert twin(**ARGUMENTS) == expected
    assert torch.equal(logits_of(twin.policy_model, CASE.preferred_seq[0]), logits)
    train(twin)
    assert all(p.grad is None for p in dpo.parameters())
    assert not torch.equal(logits_of(twin.policy_model, CASE.preferred_seq[0]), logits)


# adapters


def adapted(model: nn.Module, targets: str = "q_proj", trained: str = "", **kwargs: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    with seeded(0):
        kwargs = {"r": 2, "lora_dropout": 0.5} | kwargs
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets.split(), **kwargs))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if trained and any(part in name for part in trained.split()):
                    p += 0.3 * torch.randn_like(p)
    return model


def with_two(active: str) -> nn.Module:
    import peft

    model = adapted(hf_llama(0), trained="lora_B")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(active)
    return model


def with_prefix() -> nn.Module:
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(hf_llama(0), config)


# whether the policy with its adapter off may serve as reference; whether the head may be used alone
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], bool, bool]] = {
    "fresh": (lambda: adapted(hf_llama(0)), True, True),
    "trained": (lambda: adapted(hf_llama(0), trained="lora_B"), False, True),
    "on the head": (lambda: adapted(hf_llama(0), "q_proj lm_head"), True, False),
    "on the head, trained": (lambda: adapted(hf_llama(0), "q_proj lm_head", "lora_B"), False, False),
    "on a tied head": (lambda: adapted(ZOO["hf-llama-tied"](0), "lm_head", "lora_B"), False, False),
    "on the embedding": (lambda: adapted(hf_llama(0), "embed_tokens"), True, True),
    "on the embedding, trained": (lambda: adapted(hf_llama(0), "embed_tokens", "embedding_A"), False, True),
    "modules_to_save": (lambda: adapted(hf_llama(0), modules_to_save=["lm_head"]), False, False),
    "DoRA": (lambda: adapted(hf_llama(0), use_dora=True), False, True),
    "DoRA, magnitudes trained": (
        lambda: adapted(hf_llama(0), trained="magnitude", use_dora=True),
        False,
        True,
    ),
    "tokens": (lambda: adapted(hf_llama(0), trainable_token_indices=[1, 2]), False, True),
    "two, the trained one active": (lambda: with_two("default"), False, True),
    "two, the fresh one active": (lambda: with_two("other"), False, True),
    "prefix": (with_prefix, False, False),
    "x-transformers": (lambda: adapted(ZOO["xt-rotary"](0), "to_q"), True, True),
    "x-transformers, trained": (lambda: adapted(ZOO["xt-wrapped"](0), "to_q", "lora_B"), False, True),
    "x-transformers, head": (lambda: adapted(ZOO["xt-rotary"](0), "to_q to_logits"), True, False),
    "x-transformers, tied": (lambda: adapted(ZOO["xt-tied"](0), "token_emb.emb", "embedding_A"), False, True),
    "plain": (lambda: adapted(ZOO["plain-transformer"](0), "linear1"), True, False),
}


@pytest.mark.pitfall(5, 6)
@pytest.mark.filterwarnings("ignore:.*all logits|.*tie_word_embeddings|.*tied")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_start_at_their_reference(name):
    pytest.importorskip("peft")
    make, adapter_off, head_applies = ADAPTERS[name]
    dpo = DPO(make())
    check_reference_stays(dpo)
    assert (dpo.ref_model is None) == adapter_off
    assert dpo.score_policy.head_applies == head_applies
    trained = [p for p in dpo.policy_model.parameters() if p.requires_grad]
    dpo(**ARGUMENTS).backward()
    assert trained and all(p.grad is not None for p in trained)


@pytest.mark.pitfall(19)
@pytest.mark.filterwarnings("ignore:.*all logits|.*tie_word_embeddings|.*tied|.*prefixes are not shared")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_get_the_gradients_of_the_models_own_logits(name):
    pytest.importorskip("peft")
    policy = ADAPTERS[name][0]().double()
    disable_dropout(policy)
    seq = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(3))
    seq[1, :5], seq[3, :5] = seq[0, :5], seq[2, :5]
    answers = torch.arange(9).expand(4, -1) >= 5
    own = policy
    if name.startswith("x-transformers"):  # without the wrapper, which gives a loss
        own = getattr(policy.get_base_model(), "net", policy.get_base_model())
    with reproducible_forward(policy):  # without torch's fast path in eval mode, which leaves adapters out
        logits = own(seq)
    logits = getattr(logits, "logits", logits)[:, -9:-1].log_softmax(dim=-1)
    plain = logits.gather(-1, seq[:, 1:, None])[..., 0].masked_fill(~answers[:, 1:], 0.0).sum(dim=-1)

    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    weights = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
    scorer = Scorer(policy, share="auto")
    ours = scorer(ScoredSequences.from_padded(seq, answers, torch.ones_like(answers)))
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-8)
    found, wanted = (
        torch.autograd.grad(sums @ weights, list(trained.values()), allow_unused=True)
        for sums in (ours, plain)
    )
    for key, got, truth in zip(trained, found, wanted, strict=True):
        assert (got is None) == (truth is None), key
        if truth is not None:
            torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
    assert any(truth is not None and truth.any() for truth in wanted)


def test_the_reference_of_an_adapter_has_no_dropout_though_the_policy_has():
    policy = adapted(ZOO["hf-gpt2"](0), "c_attn", fan_in_fan_out=True).train()
    dpo = DPO(policy, disable_dropout=False)
    assert dpo.ref_model is None
    assert len({of_reference(dpo) for _ in range(4)}) == 1
    assert len({dpo(**ARGUMENTS).item() for _ in range(4)}) == 4
    assert all(module.training for module in policy.modules())


def test_what_is_frozen_in_an_adapter_stays_so():
    """PEFT lets all of an adapter train once it is switched on again."""
    policy = adapted(hf_llama(0))
    for name, p in policy.named_parameters():
        p.requires_grad_("lora_B" in name)
    dpo = DPO(policy)
    assert dpo.ref_model is None
    train(dpo, steps=2)
    assert {name.split(".")[-3] for name, p in policy.named_parameters() if p.requires_grad} == {"lora_B"}


@pytest.mark.pitfall(24)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reference", ["adapter", "copy"])
def test_adapters_get_the_same_gradients_with_activation_checkpointing(reference, reentrant):
    results = []
    for checkpointed in (False, True):
        policy = adapted(hf_llama(0)).train()
        if checkpointed:
            policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
            policy.enable_input_require_grads()
        dpo = DPO(policy, reference=reference).train()
        train(dpo, steps=2)
        dpo(**ARGUMENTS).backward()
        results.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert len(results[0]) == len(results[1]) == 4
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])


# dtypes and modes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["xt-tied", "xt-rotary", "hf-llama", "hf-gemma2", "plain-transformer"])
def test_a_dpo_changes_its_dtype_as_a_whole(name, dtype):
    dpo = DPO(ZOO[name](0))
    dpo(**ARGUMENTS)
    loss = dpo.to(dtype)(**ARGUMENTS)
    assert abs(loss.item() - LN2) < 1e-6
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    before = of_reference(dpo)
    nudged(dpo.policy_model, 0.05)
    assert of_reference(dpo) == before
    # the margins of three pairs may cancel in the loss (in bfloat16 a rounding of the attention decides);
    # the log-probs of a side, by 0.1 nats or more, show that the policy is not the reference
    metrics = dpo(**ARGUMENTS, return_metrics=True)[1]
    assert max(abs(metrics["rewards/chosen"]), abs(metrics["rewards/rejected"])) > 0.01  # beta = 0.1


@pytest.mark.parametrize("name", ["xt-rotary", "hf-llama", "plain-transformer", "plain-tied"])
def test_the_first_step_under_autocast_trains_what_later_ones_do(name):
    """The first look makes no casts of weights that the step would then use without gradients."""
    dpo = DPO(ZOO[name](0))
    steps = []
    for _ in range(2):
        dpo.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = dpo(**ARGUMENTS)
        loss.backward()
        assert loss.dtype == torch.float32 and abs(loss.item() - LN2) < 1e-6
        steps.append({name: p.grad for name, p in dpo.policy_model.named_parameters()})
    for name, gradient in steps[0].items():
        assert gradient is not None and torch.equal(gradient, steps[1][name]), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_may_come_first(context):
    for name in ("xt-alibi", "xt-xpos", "hf-llama"):  # some of these register buffers on their first run
        dpo = DPO(ZOO[name](0))
        with context():
            assert abs(dpo(**ARGUMENTS).item() - LN2) < 1e-6
        train(dpo, steps=1)


@pytest.mark.parametrize("name", ["xt-dropout", "hf-gpt2", "hf-opt", "plain-transformer"])
def test_train_mode_between_calls_changes_nothing(name):
    dpo = DPO(ZOO[name](0))
    nudged(dpo.policy_model)
    expected = dpo(**ARGUMENTS)
    for module in (dpo.policy_model, dpo.ref_model, dpo):
        module.train()
        assert dpo(**ARGUMENTS) == expected


# saving, sharing, wrapping


@pytest.mark.parametrize("name", ["xt-tied", "xt-wrapped", "hf-llama-tied", "plain-tied"])
def test_a_state_dict_carries_policy_and_reference(name):
    dpo, fresh = DPO(ZOO[name](0)), DPO(ZOO[name](5))
    nudged(dpo.policy_model, 0.1)
    assert {key.split(".")[0] for key in dpo.state_dict()} == {"policy_model", "ref_model"}
    fresh.load_state_dict(dpo.state_dict())
    assert fresh(**ARGUMENTS) == dpo(**ARGUMENTS)


@pytest.mark.parametrize("name", ["xt-rotary", "hf-llama", "plain-transformer"])
def test_a_dpo_can_be_pickled(name):
    dpo = DPO(ZOO[name](0))
    nudged(dpo.policy_model, 0.1)
    expected = dpo(**ARGUMENTS)
    file = io.BytesIO()
    torch.save(dpo, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(**ARGUMENTS) == expected


@pytest.mark.parametrize("name", ["xt-tied", "hf-llama"])
def test_two_around_one_model_have_their_own_references(name):
    policy = ZOO[name](0)
    first = DPO(policy)
    nudged(policy, 0.1)
    second = DPO(policy)
    assert abs(first(**ARGUMENTS).item() - LN2) > 1e-4
    assert abs(second(**ARGUMENTS).item() - LN2) < 1e-6


@pytest.mark.filterwarnings("ignore:of a compiled")
@pytest.mark.parametrize("name", ["xt-tied", "xt-wrapped", "hf-llama", "plain-transformer"])
def test_a_compiled_model_is_of_its_family(name):
    plain = DPO(ZOO[name](0))
    dpo = DPO(torch.compile(ZOO[name](0), backend="eager"))
    for each in (plain, dpo):
        nudged(each.policy_model, 0.1)
    assert torch.allclose(dpo(**ARGUMENTS), plain(**ARGUMENTS), atol=1e-6)
    assert dpo.score_policy.head_applies == plain.score_policy.head_applies
    assert dpo.score_policy.vocab_size == VOCAB
    torch._dynamo.reset()


def test_compiling_that_cannot_act_is_told():
    with pytest.warns(UserWarning, match=r"only the whole is compiled.*: compile model.model instead"):
        DPO(torch.compile(hf_llama(0), backend="eager"))


def test_a_policy_in_data_parallel_scores_right_and_is_told():
    with pytest.warns(UserWarning, match="inside DataParallel all logits .* wrap DPO, not the model"):
        dpo = DPO(nn.DataParallel(hf_llama(0)))
    nudged(dpo.policy_model)
    assert torch.allclose(dpo(**ARGUMENTS), naive_loss(dpo.policy_model, hf_llama(0).eval()), atol=1e-5)


def test_a_subclass_of_a_wrapper_is_of_its_family():
    from x_transformers import AutoregressiveWrapper

    class Mine(AutoregressiveWrapper):
        pass

    dpo = DPO(Mine(ZOO["xt-rotary"](0)))
    dpo(**ARGUMENTS)
    assert dpo.score_policy.head_applies


@pytest.mark.pitfall(19)
@pytest.mark.filterwarnings("ignore:all logits")
@pytest.mark.parametrize("of_policy", [True, False], ids=["policy", "dpo"])
@pytest.mark.parametrize("name", ["hf-llama", "xt-tied"])
def test_sharded_parameters_train_alike(name, of_policy, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, sharded = DPO(ZOO[name](0)), DPO(ZOO[name](0))
        fully_shard(sharded.policy_model if of_policy else sharded)
        for dpo in (plain, sharded):
            train(dpo)
        assert torch.allclose(sharded(**ARGUMENTS), plain(**ARGUMENTS), atol=1e-5)
        assert sharded.score_policy.head_applies != of_policy
    finally:
        distributed.destroy_process_group()


# batches


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32])
def test_ids_of_any_integer_dtype(dtype):
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0))
    narrow = {k: ARGUMENTS[k].to(dtype) for k in ("preferred_seq", "unpreferred_seq")}
    assert dpo(**ARGUMENTS | narrow) == dpo(**ARGUMENTS)


def test_given_reference_log_probs_go_by_pairs():
    """In a batch whose sequences stand in another order: chosen and rejected in turn."""
    dpo = DPO(nudged(ZOO["xt-rotary"](0)), reference=ZOO["xt-rotary"](0))
    seqs = (CASE.preferred_seq, CASE.unpreferred_seq)
    batch = PreferenceBatch.from_padded(seqs, CASE.prompt_masks, CASE.seq_masks)
    with torch.no_grad():
        given = tuple(naive_sums(dpo.ref_model))
    expected = dpo(batch, ref_log_probs=given)
    assert torch.allclose(expected, dpo(batch), atol=1e-6)
    turned = batch.pairs.flip(0)  # the last pair first
    swapped = type(batch)(batch.sequences, turned)
    assert torch.allclose(
        dpo(swapped, ref_log_probs=tuple(side.flip(0) for side in given)), expected, atol=1e-6
    )
