"""Reference log-probs that are looked up: under which state, in which batches, in which processes."""

import math

import pytest
import torch

from dpo_wrapper import DPO, precompute_ref_log_probs
from dpo_wrapper.batches import PreferenceBatch
from dpo_wrapper.data import TokenizedExample, scored_sequences
from dpo_wrapper.models.batch_dependence import max_independent_length
from dpo_wrapper.reference.reference import ModelReference
from helpers.adapters import lora
from helpers.dpo_calls import LN2
from helpers.models import VOCAB, ZOO, hf_llama
from helpers.naive_dpo import reference_log_probs
from helpers.runs import run_in_two_processes

BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.fixture
def computed(monkeypatch):
    """Of each batch that a reference has computed, the number of its sequences."""
    counts, compute = [], ModelReference.compute

    def counted(self, sequences):
        counts.append(len(sequences.ids))
        return compute(self, sequences)

    monkeypatch.setattr(ModelReference, "compute", counted)
    return counts


def test_training_under_autocast_and_evaluation_outside_have_a_memory_each(computed):
    dpo = DPO(ZOO["hf-llama"](0), cache_ref_log_probs=True)
    for _ in range(3):
        with torch.autocast(**BFLOAT16):
            low = reference_log_probs(dpo)
        with torch.no_grad():
            high = reference_log_probs(dpo)
    assert len(computed) == 2 and low != high
    known = len(dpo.reference.cache)
    plain = DPO(dpo.policy_model, reference=dpo.ref_model)
    assert high == pytest.approx(reference_log_probs(plain), abs=1e-5)
    with torch.autocast(**BFLOAT16):
        assert low == pytest.approx(reference_log_probs(plain), abs=1e-5)
    with torch.no_grad():
        dpo.ref_model.lm_head.weight.mul_(1.1)  # both are of the past
    assert high != pytest.approx(reference_log_probs(dpo), abs=1e-5)
    with torch.autocast(**BFLOAT16):
        assert low != pytest.approx(reference_log_probs(dpo), abs=1e-5)
    assert len(dpo.reference.cache) == known


def test_what_cannot_be_seen_can_be_forgotten(computed):
    dpo = DPO(ZOO["hf-llama"](0), cache_ref_log_probs=True)
    before = reference_log_probs(dpo)
    dpo.ref_model.lm_head.weight.data *= 1.5
    assert reference_log_probs(dpo) == before
    dpo.forget_ref_log_probs()
    after = reference_log_probs(dpo)
    assert after != before and after == reference_log_probs(DPO(dpo.policy_model, reference=dpo.ref_model))
    for kind in ("none", ZOO["hf-llama"](1)):  # nothing is kept
        DPO(dpo.policy_model, reference=kind).forget_ref_log_probs()


# models whose log-probs depend on the batch

ROPE = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
        }
    },
}


def rope_model(rope_type, seed=0):
    length = 16 if rope_type == "dynamic" else 64
    return hf_llama(
        seed, num_attention_heads=2, hidden_size=16, max_position_embeddings=length, **ROPE[rope_type]
    )


def pair(length, seed):
    ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenizedExample(tuple(ids[0][:2]), (tuple(ids[0][2:]), tuple(ids[1][2:])))


def batch_of(*examples):
    return PreferenceBatch.from_lists(*zip(*((e.prompt, *e.completions) for e in examples), strict=True))


@pytest.mark.parametrize("rope_type", ROPE)
@pytest.mark.parametrize("kind", ["copy", "adapter"])
def test_log_probs_are_not_recalled_from_batches_that_change_them(rope_type, kind, computed):
    model = rope_model(rope_type)
    assert max_independent_length(model) == 16
    dpo = DPO(lora(model) if kind == "adapter" else model, reference=kind, cache_ref_log_probs=True)
    short, other, long = pair(12, 0), pair(10, 1), pair(40, 2)
    with pytest.warns(UserWarning, match="batches longer than 16 tokens are not cached"):
        mixed = dpo(batch_of(short, long))
    with torch.no_grad():
        for batch in ((short,), (short, other), (long, short), (long,), (other,)):
            assert abs(dpo(batch_of(*batch)) - LN2) < 1e-5
    assert abs(mixed - LN2) < 1e-5
    assert computed == [4, 2, 4, 4, 2]  # the last of the short ones was known


def test_models_that_depend_on_their_batch(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    nested = hf_llama(0)
    layers = {
        "full_attention": ROPE["longrope"]["rope_parameters"],
        "sliding_attention": {"rope_type": "default"},
    }
    nested.config.rope_parameters = layers
    nested.config.max_position_embeddings = 64
    assert max_independent_length(torch.nn.Sequential(nested)) == 16
    of_old = hf_llama(0)
    of_old.config.rope_scaling = {"type": "dynamic", "factor": 2.0}
    assert max_independent_length(of_old) == of_old.config.max_position_embeddings
    doge = transformers.DogeConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        keep_window_size=24,
    )
    assert max_independent_length(transformers.DogeForCausalLM(doge)) == 24
    for name in ("xt-rotary", "hf-llama", "hf-gemma2", "plain-tied"):
        assert max_independent_length(ZOO[name](0)) == math.inf
    lily = peft.get_peft_model(hf_llama(0), peft.LilyConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="cache_ref_log_probs has no effect, for the reference's log-probs"):
        assert DPO(lily, cache_ref_log_probs=True).reference.cache is None

    model, examples = rope_model("dynamic"), [pair(12, 0), pair(17, 1)]
    short, long = ([scored_sequences([e], 64)[0]] for e in examples)
    assert len(precompute_ref_log_probs(short, model, tmp_path / "short")) == 2
    assert len(precompute_ref_log_probs(long, model, tmp_path / "long")) == 2  # the last token is no input
    long = scored_sequences([pair(18, 1)], 64)
    with pytest.raises(
        ValueError, match=r"should not depend on the batch.* longer than 16 tokens, and one has 17"
    ):
        precompute_ref_log_probs(long, model, tmp_path / "longer")


# processes

SHARDED = """
import torch
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from dpo_wrapper import DPO
from dpo_wrapper.reference.reference import ModelReference
from helpers.batches import random_batch
from helpers.dpo_calls import arguments
from helpers.models import ZOO

torch.set_num_threads(1)
rank = PartialState(cpu=True).process_index
cases = [arguments(random_batch(torch.Generator().manual_seed(k), b=2, odd=0)) for k in range(3)]
steps = [(0, 1), (0, 2), (0, 1), (1, 0)]  # in the second, process 0 knows its pairs and process 1 does not
counts, compute = [0], ModelReference.compute

def counted(self, sequences):
    counts[0] += 1
    return compute(self, sequences)

ModelReference.compute = counted
plain, dpo = (DPO(ZOO["hf-llama"](0), cache_ref_log_probs=has_cache) for has_cache in (False, True))
for model in (dpo.policy_model, dpo.ref_model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
for model in (dpo.policy_model, dpo.ref_model):  # each process holds half of either
    local = [p.to_local().numel() for p in model.parameters()]
    assert sum(local) < 0.6 * sum(p.numel() for p in model.parameters())
counts[0] = 0
for step in steps:
    case = cases[step[rank]]
    loss, metrics = dpo(**case, return_metrics=True)
    loss.backward()
    calls = counts[0]
    expected = plain(**case, return_metrics=True)[1]["logps/ref_chosen"]
    counts[0] = calls
    torch.testing.assert_close(metrics["logps/ref_chosen"], expected, rtol=1e-5, atol=1e-5)
# in the second step process 0 computes for the sake of process 1; the third is known to both
assert counts[0] == 3, (rank, counts)
"""


@pytest.mark.slow
def test_processes_with_a_sharded_reference_recall_together(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SHARDED)
    run_in_two_processes(script)


ADAPTER = """
import torch
from accelerate import PartialState
from torch.distributed.fsdp import fully_shard
from dpo_wrapper import DPO
from helpers.adapters import lora
from helpers.batches import random_batch
from helpers.dpo_calls import arguments
from helpers.models import ZOO

torch.set_num_threads(1)
PartialState(cpu=True)
case = arguments(random_batch(torch.Generator().manual_seed(0), b=2, odd=0))
losses = {}
for is_sharded in (False, True):
    torch.manual_seed(0)  # of the adapter's weights
    dpo = DPO(lora(ZOO["hf-llama"](0)), share_prefix="auto")
    if is_sharded:
        for layer in dpo.policy_model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(dpo.policy_model)
    optimizer = torch.optim.SGD([p for p in dpo.parameters() if p.requires_grad], lr=1.0)
    losses[is_sharded] = []
    for _ in range(4):
        loss = dpo(**case)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[is_sharded].append(float(loss))
assert losses[False][-1] < losses[False][0] - 1e-3, losses
torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_a_sharded_policy_is_its_own_reference_with_its_adapter_off(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ADAPTER)
    run_in_two_processes(script)
