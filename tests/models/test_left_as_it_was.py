"""The caller's model is left as it was: modes, attributes, configuration, and what other threads see."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dpo_wrapper import DPO
from dpo_wrapper.models import eval_mode
from helpers.dpo_calls import arguments, nudged
from helpers.marks import mark_slow_except
from helpers.models import VOCAB, ZOO, hf_llama, randomise_, seeded
from helpers.shareable_models import CASES, SHAREABLE

NAMES = ["xt-dropout", "xt-window", "xt-alibi", "hf-opt", "hf-gpt2", "xt-gru", "lfm2", "plain-transformer"]


def set_modes(model: nn.Module, modes: str) -> None:
    """All in train mode, all in eval mode, or every second module in each."""
    for k, module in enumerate(model.modules()):
        module.training = modes == "train" or (modes == "mixed" and k % 2 == 0)


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """All that the modules of a model and their configurations hold, tensors by identity."""

    def describe_value(value: Any) -> Any:
        return id(value) if isinstance(value, (Tensor, nn.Module)) or callable(value) else repr(value)

    return [
        {key: describe_value(value) for key, value in {**vars(m), **vars(getattr(m, "config", m))}.items()}
        for m in model.modules()
    ]


@pytest.mark.parametrize(
    "name, checkpointed",
    [
        *mark_slow_except([(n, False) for n in NAMES if n != "xt-gru"], [(n, False) for n in NAMES]),
        ("hf-opt", True),
        ("hf-gpt2", True),
    ],
)
def test_modes_rates_and_attributes(name, checkpointed):
    policy = SHAREABLE.get(name, ZOO.get(name))(0)
    if checkpointed:
        policy.train().gradient_checkpointing_enable()
    dpo = DPO(policy)
    dpo(**arguments(CASES[1])).backward()  # some libraries register buffers on their first run
    dpo.zero_grad()
    for modes in ("train", "eval", "mixed"):
        set_modes(policy, modes)
        before = describe(policy)
        loss = dpo(**arguments(CASES[1]))
        assert describe(policy) == before
        loss.backward()
        assert describe(policy) == before
        with torch.no_grad():
            dpo(**arguments(CASES[1]))
        assert describe(policy) == before
        assert not eval_mode._held


@pytest.mark.parametrize("name", mark_slow_except(["xt-dropout", "hf-opt", "plain-transformer"], NAMES))
def test_an_error_leaves_the_modes_too(name):
    policy = SHAREABLE.get(name, ZOO.get(name))(0).train()
    dpo, should_fail = DPO(policy), ""

    def fail(when: str) -> None:
        if should_fail == when:
            raise ZeroDivisionError

    def fail_in_either(_module: nn.Module, _inputs: Any, output: Any) -> None:
        fail("forward")
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(lambda _: fail("backward"))

    embedding = next(m for m in policy.modules() if isinstance(m, nn.Embedding))
    embedding.register_forward_hook(fail_in_either)
    expected = dpo(**arguments(CASES[1]))
    for should_fail in ("forward", "backward", ""):
        before = describe(policy)
        if should_fail:
            with pytest.raises(ZeroDivisionError):
                dpo(**arguments(CASES[1])).backward()
        else:
            loss = dpo(**arguments(CASES[1]))
            loss.backward()
            assert torch.equal(loss, expected)
        assert describe(policy) == before or not should_fail
        assert all(module.training for module in policy.modules()) and not eval_mode._held


class Merging(nn.Module):
    """A LoRA layer that merges its weights in `train(False)`, as loralib's do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) * 0.3)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) * 0.3)
        self.is_merged = False

    def train(self, mode: bool = True) -> "Merging":
        if self.is_merged == mode:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight.T
        return out if self.is_merged else out + x @ self.a.T @ self.b.T


def test_layers_that_merge_in_eval_mode_are_not_merged():
    policy = hf_llama(0)
    torch.manual_seed(0)
    for layer in policy.model.layers:
        layer.self_attn.q_proj = Merging(layer.self_attn.q_proj)
    merging = [m for m in policy.modules() if isinstance(m, Merging)]
    weights = [m.weight.detach().clone() for m in merging]
    reference = copy.deepcopy(policy)
    dpo = DPO(policy, reference=reference)
    for _ in range(2):
        dpo(**arguments(CASES[1])).backward()
    for module, weight in zip(merging, weights, strict=True):
        assert not module.is_merged and torch.equal(module.weight, weight)
        assert module.a.grad.any() and module.b.grad.any()


def test_a_configuration_names_nothing_of_the_package():
    policy = hf_llama(0)
    policy.train().gradient_checkpointing_enable()
    loss = DPO(policy)(**arguments(CASES[1]))
    for _ in range(2):
        assert b"dpo_wrapper" not in pickle.dumps(policy.config)
        loss.backward(retain_graph=True)


@pytest.mark.slow
def test_a_configuration_loads_in_another_process(tmp_path):
    policy = hf_llama(0)
    policy.train().gradient_checkpointing_enable()
    dpo = DPO(policy)
    loss = dpo(**arguments(CASES[1]))
    for path in (tmp_path / "before", tmp_path / "after"):
        path.write_bytes(pickle.dumps(policy.config))
        loss.backward(retain_graph=True)
    code = (
        "import pickle, sys, torch, transformers\n"
        "for path in sys.argv[1:]:\n"
        "    transformers.LlamaForCausalLM(pickle.load(open(path, 'rb')))(torch.arange(5)[None])\n"
        "assert 'dpo_wrapper' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "before", tmp_path / "after"], check=True)


@pytest.mark.parametrize(
    "name",
    mark_slow_except(
        ["xt-alibi", "hf-llama"], ["xt-rotary", "xt-window", "xt-alibi", "xt-t5", "hf-llama", "gemma2"]
    ),
)
def test_another_thread_may_use_the_model_meanwhile(name, request):
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    dpo = DPO(SHAREABLE[name](0).eval())
    policy, ids = dpo.policy_model, CASES[1].preferred_seq
    dpo(**arguments(CASES[1]))
    call = getattr(policy, "net", policy)
    with torch.no_grad():
        expected = call(ids)
    expected = getattr(expected, "logits", expected)
    results: list[Tensor | Exception] = []
    is_over = threading.Event()

    def use() -> None:
        while not is_over.is_set():
            try:
                with torch.no_grad():
                    output = call(ids)
                results.append(getattr(output, "logits", output))
            except Exception as error:
                results.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(8):
            dpo(**arguments(CASES[1])).backward()
    finally:
        is_over.set()
        thread.join()
    assert len(results) > 3
    for result in results:
        assert isinstance(result, Tensor), result
        assert torch.allclose(result, expected, atol=1e-5)


def test_two_threads_put_the_modes_back():
    policy = ZOO["xt-dropout"](0).train()
    dpo = DPO(policy)
    dpo(**arguments(CASES[1]))
    first, second = (eval_mode.eval_mode(policy) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in policy.modules())
    second.__exit__(None, None, None)
    assert all(module.training for module in policy.modules())


@pytest.mark.parametrize("order", ["before", "after"])
def test_other_losses_of_the_same_backward_pass_keep_their_dropout_and_their_attention(order):
    """A checkpointed pass of the caller's own, with dropout and without a tree, beside one of `DPO`."""
    policy = nudged(ZOO["hf-opt"](0).double().train())
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    dpo = DPO(policy, reference=ZOO["hf-opt"](1).double())
    dpo(**arguments(CASES[1]))

    def own_loss() -> Tensor:
        torch.manual_seed(5)
        return policy(input_ids=CASES[1].preferred_seq).logits.logsumexp(dim=-1).mean()

    def preference_loss() -> Tensor:
        return dpo(**arguments(CASES[1]))

    gradients = []
    for parts in ([own_loss], [preference_loss], [own_loss, preference_loss]):
        policy.zero_grad()
        sum(part() for part in (parts if order == "before" else parts[::-1])).backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    for own, preference, both in zip(*gradients, strict=True):
        assert torch.allclose(own + preference, both, atol=1e-9, rtol=1e-6)


def test_two_passes_in_one_backward_pass():
    policy = nudged(ZOO["hf-llama"](0).double().train())
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    dpo = DPO(policy, reference=ZOO["hf-llama"](1).double())
    gradients = []
    for cases in ([CASES[0]], [CASES[1]], CASES[:2]):
        policy.zero_grad()
        sum(dpo(**arguments(case)) for case in cases).backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    for one, other, both in zip(*gradients, strict=True):
        assert torch.allclose(one + other, both, atol=1e-9, rtol=1e-6)


def make_rwkv() -> nn.Module:
    """It divides weights of its later layers by 2 in eval mode, and multiplies them in train mode."""
    sizes = dict(vocab_size=VOCAB, hidden_size=16, attention_hidden_size=16, context_length=64)
    config = transformers.RwkvConfig(num_hidden_layers=2, rescale_every=1, **sizes)
    with seeded(0):
        return randomise_(transformers.RwkvForCausalLM(config), std=0.2).train()


def make_reformer() -> nn.Module:
    sizes = dict(vocab_size=VOCAB, hidden_size=16, feed_forward_size=32, num_attention_heads=2)
    sizes |= dict(attention_head_size=8, max_position_embeddings=64, local_attn_chunk_length=64)
    options = dict(is_decoder=True, axial_pos_embds=False, attn_layers=["local"], hidden_dropout_prob=0.0)
    with seeded(0):
        config = transformers.ReformerConfig(**sizes, **options, tie_word_embeddings=False)
        return randomise_(transformers.ReformerModelWithLMHead(config), std=0.2).train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make, reason", [(make_rwkv, "changes its weights"), (make_reformer, "fails in backward")]
)
def test_models_that_cannot_train_in_eval_mode_are_refused(make, reason):
    policy = make()
    weights = copy.deepcopy(policy.state_dict())

    def assert_unchanged() -> None:
        for name, value in policy.state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert all(module.training for module in policy.modules())

    with pytest.raises(ValueError, match=f"{reason}.*: use disable_dropout = False"):
        DPO(policy)(**arguments(CASES[1]))
    assert_unchanged()
    dpo = DPO(policy, disable_dropout=False)
    for _ in range(2):
        dpo(**arguments(CASES[1])).backward()
        assert_unchanged()
    without = [name for name, p in policy.named_parameters() if p.grad is None]
    assert without in ([], ["lm_head.bias"])  # which Reformer never uses


@pytest.mark.parametrize(
    "is_used, reentrant",
    mark_slow_except([(True, True), (False, False)], product([True, False], [True, False])),
)
def test_nothing_holds_a_model_that_is_gone(is_used, reentrant):
    policy = ZOO["hf-llama"](0).train()
    policy.gradient_checkpointing_enable({"use_reentrant": reentrant})
    dpo = DPO(policy)
    loss = dpo(**arguments(CASES[1]))
    if is_used:
        loss.backward()
    gone = weakref.ref(policy)
    del dpo, policy, loss
    gc.collect()
    assert gone() is None
