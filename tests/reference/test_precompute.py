"""The cached reference: that it is the reference, knows what made it, and is computed once."""

import copy
import json
import pickle
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo_wrapper import DPO, PreferenceBatch, PreferenceCollator, Sigmoid, precompute_ref_log_probs
from dpo_wrapper.batches import RankedBatch, SequenceLogProbs, UnpairedBatch
from dpo_wrapper.data import TokenizedExample, scored_sequences
from dpo_wrapper.losses import KTO, PlackettLuce
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.reference import precompute
from dpo_wrapper.reference.cache import LogProbCache
from dpo_wrapper.scoring.scorer import Scorer
from dpo_wrapper.training.run_folder import RunFolder
from dpo_wrapper.training.train import train
from dpo_wrapper.training.trainer import Trainer
from helpers.adapters import lora
from helpers.datasets import dataset, pairs
from helpers.marks import mark_slow_except
from helpers.models import ZOO
from helpers.runs import (
    SMALL_DECODER,
    InterruptedRunError,
    assert_metrics_close,
    interrupt_training,
    make_config,
    read_metrics,
    run_in_two_processes,
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SMALL_DECODER)
    monkeypatch.setattr(precompute, "SEQUENCES_PER_FILE", 6)


def columns(data, rows):
    return PreferenceCollator(-100)([data[k] for k in rows])


def precompute_all(data, model, folder, **options):
    """Pair by pair, three pairs to a file."""
    return precompute_ref_log_probs(scored_sequences(data, 1), model, folder, **options)


def calls_of(monkeypatch):
    """How many sequences each scorer is given from now on."""
    counts: dict[int, int] = {}
    score = Scorer.__call__

    def counted(self, sequences, *args, **kwargs):
        counts[id(self)] = counts.get(id(self), 0) + len(sequences.ids)
        return score(self, sequences, *args, **kwargs)

    monkeypatch.setattr(Scorer, "__call__", counted)
    return counts


@pytest.mark.parametrize(
    "name, ld_alpha",
    mark_slow_except(
        [("xt-rotary", 1.0), ("hf-llama", 0.3), ("plain-tied", 1.0)],
        product(["xt-rotary", "hf-llama", "plain-tied"], [1.0, 0.3]),
    ),
)
def test_a_cache_gives_the_loss_of_the_reference(name, ld_alpha, tmp_path):
    policy, reference, data = ZOO[name](0), ZOO[name](1), dataset()
    sequences = scored_sequences(data.examples, 30)
    cached = precompute_ref_log_probs(sequences, reference, tmp_path, per_token=ld_alpha < 1)
    plain = DPO(policy, reference=reference, ld_alpha=ld_alpha)
    dpo = DPO(policy, reference=cached, ld_alpha=ld_alpha)
    assert dpo.ref_model is None and "sequences, computed before" in dpo.explain()
    for rows in ([0, 1, 2, 3, 4, 5, 6], [6, 2], [3]):
        loss, metrics = dpo(**columns(data, rows), return_metrics=True)
        expected, theirs = plain(**columns(data, rows), return_metrics=True)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert metrics.keys() == theirs.keys()
        for key, value in metrics.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-4)
    # padding does not matter, and so it is known from the left as well
    left = PreferenceCollator(-100, padding_side="left")([data[k] for k in (1, 4)])
    torch.testing.assert_close(dpo(**left), plain(**left), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"knows \d+ sequences, but not all of this batch: run precompute"):
        dpo(**columns(dataset(pairs(2, seed=9)), [0, 1]))


def test_every_kind_of_reference_can_be_cached(tmp_path):
    data = dataset()
    adapted = DPO(lora(ZOO["hf-llama"](0)))
    assert adapted.ref_model is None
    kinds = {
        "adapter": adapted,
        "copy": DPO(ZOO["xt-tied"](0)),
        "module": DPO(ZOO["xt-rotary"](0), reference=ZOO["hf-llama"](1)),
    }
    for name, dpo in kinds.items():
        cached = precompute_all(data.examples, dpo.reference, tmp_path / name)
        with torch.no_grad():
            for p in dpo.policy_model.parameters():
                p += 0.1 * torch.randn_like(p) if p.requires_grad else 0.0
        found = DPO(dpo.policy_model, reference=cached)(**columns(data, range(7)))
        torch.testing.assert_close(found, dpo(**columns(data, range(7))), rtol=1e-5, atol=1e-5)
        precompute_all(data.examples, dpo.reference, tmp_path / name)  # the reference is the same: not stale
    with pytest.raises(ValueError, match="the reference should have a model to compute log-probs with"):
        precompute_all(data.examples, DPO(ZOO["xt-tied"](0), reference="none").reference, tmp_path / "none")
    with pytest.raises(
        TypeError, match="sequences should be a list of ScoredSequences, but it is a list of 8"
    ):
        precompute_ref_log_probs([*pairs(), "a"], ZOO["xt-tied"](0), tmp_path / "list")


def test_entries_of_any_kind_can_be_cached(tmp_path):
    policy, reference = ZOO["xt-rotary"](0), ZOO["xt-rotary"](1)
    rows = [
        TokenizedExample((1, 2), ((3, 4), (5,), (6, 7)), weight=2.0),
        TokenizedExample((8,), ((9,),), label=True, kl_completion=(3, 4)),
    ]
    cached = precompute_all(rows, reference, tmp_path)
    assert len(cached) == 5 and len(precompute_all(pairs(), reference, tmp_path / "pairs")) == 14
    batches = (
        (PlackettLuce(), RankedBatch.from_lists([(1, 2)], [((3, 4), (5,), (6, 7))])),
        (KTO(), UnpairedBatch.from_lists([(8,)], [(9,)], [True], [(3, 4)])),
    )
    for loss, batch in batches:
        expected = DPO(policy, loss=loss, reference=reference)(batch)
        torch.testing.assert_close(DPO(policy, loss=loss, reference=cached)(batch), expected)
    moved = [*rows[:1], TokenizedExample((8,), ((9,),), label=True, kl_completion=(3, 5))]
    with pytest.raises(ValueError, match="was made with other sequences"):
        precompute_all(moved, reference, tmp_path)


def test_a_cache_without_tokens_is_refused_where_tokens_are_needed(tmp_path):
    cached = precompute_all(pairs(), ZOO["xt-rotary"](0), tmp_path)
    with pytest.raises(ValueError, match=r"the cache holds sums: make it with .*per_token = True"):
        DPO(ZOO["xt-rotary"](0), reference=cached, ld_alpha=0.5)


def test_the_data_of_other_losses_can_be_remembered_as_well():
    dpo = DPO(ZOO["xt-rotary"](0), loss=KTO(), cache_ref_log_probs=True)
    batch = UnpairedBatch.from_lists([[1, 2], [3]], [[4, 5], [6, 7, 8]], [True, False])
    first = dpo(batch)
    assert len(dpo.reference.cache) == 4  # two and their KL sequences
    assert torch.equal(dpo(batch), first)


def edited(rows, **changes):
    return [TokenizedExample(**{**vars(rows[0]), **changes}), *rows[1:]]


STALE = {
    "weights": lambda data, model: (data, ZOO["xt-rotary"](1)),
    "dtype": lambda data, model: (data, copy.deepcopy(model).double()),
    "token ids": lambda data, model: (edited(data, completions=((1, 2, 3), data[0].rejected)), model),
    "scored tokens": lambda data, model: (moved_border(data), model),
}


def moved_border(rows):
    """The same ids, of which another one is prompt: both sides must begin alike for that."""
    return [TokenizedExample((5,), ((6, 7), (6, 8))), *rows[1:]]


@pytest.mark.pitfall(14)
@pytest.mark.parametrize("key", [*STALE, "package version", "values"])
def test_a_stale_cache_is_refused(key, tmp_path, monkeypatch):
    rows = [TokenizedExample((5, 6), ((7,), (8,))), *pairs()[1:]]
    data, model = rows, ZOO["xt-rotary"](0)
    precompute_all(data, model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    options = {"per_token": key == "values"}
    if key == "package version":
        monkeypatch.setattr(precompute, "__version__", "9.9")
    elif key in STALE:
        data, model = STALE[key](data, model)
    changed = {"dtype": "weights and dtype", "token ids": "sequences", "scored tokens": "sequences"}
    others = changed.get(key, key)  # other bytes are other weights
    with pytest.raises(ValueError, match=f"was made with other {others}: delete the folder, or name another"):
        precompute_all(data, model, tmp_path, **options)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_autocast_is_a_dtype_of_its_own(tmp_path):
    data, model = pairs(), ZOO["hf-llama"](0)
    with torch.autocast("cpu", torch.bfloat16):
        precompute_all(data, model, tmp_path)
    with pytest.raises(ValueError, match="was made with other dtype: "):
        precompute_all(data, model, tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    data, model = pairs(), ZOO["xt-rotary"](0)
    precompute_all(data, model, tmp_path)
    (tmp_path / "part-00001.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"part-00001.safetensors cannot be read \(.*: delete it"):
        precompute_all(data, model, tmp_path)


def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    data, model = pairs(), ZOO["xt-rotary"](0)
    done = []

    def interrupt(count):
        done.append(count)
        if len(done) == 2:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        precompute_all(data, model, tmp_path / "a", progress=interrupt)
    assert done == [6, 6]
    (tmp_path / "a" / "part-00002.new").write_bytes(b"half a file")
    counts = calls_of(monkeypatch)
    resumed = precompute_all(data, model, tmp_path / "a")
    look = 8  # what a scorer's first look at a model takes: two pairs, twice or three times
    assert 2 <= sum(counts.values()) <= 2 + 2 * look  # the one pair that was left
    whole = precompute_all(data, model, tmp_path / "b")
    assert resumed.values == whole.values and len(whole) == 14
    counts.clear()
    assert precompute_all(data, model, tmp_path / "b").values == whole.values and not counts


def test_a_lookup_gives_what_was_stored():
    batch = PreferenceBatch.from_padded(
        (torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2], [4, 9]])),
        (torch.tensor([[1, 0, 0], [1, 1, 1]]).bool(), torch.tensor([[1, 0], [1, 0]]).bool()),
        (torch.ones(2, 3).bool(), torch.ones(2, 2).bool()),
    )
    sequences = batch.sequences
    assert (
        len(set(sequences.content_hashes())) == 4
        and sequences.to("cpu").content_hashes() == sequences.content_hashes()
    )
    tokens = -torch.arange(4.0)
    for cache, log_probs in (
        (LogProbCache(), SequenceLogProbs(-torch.arange(4.0).double())),
        (LogProbCache(per_token=True), sequences.log_probs(tokens)),
    ):
        assert cache.lookup(sequences) is None
        cache.store(sequences, log_probs)
        other = LogProbCache(cache.per_token)
        other.load_state_dict(cache.state_dict())
        for each in (cache, other, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            found = each.lookup(sequences)
            assert torch.equal(found.sums, log_probs.sums) and found.sums.dtype == log_probs.sums.dtype
            assert torch.equal(found.tokens, tokens) if cache.per_token else found.tokens is None
    empty = LogProbCache()
    empty.load_state_dict(LogProbCache().state_dict())
    assert len(empty) == 0


def test_the_reference_runs_once_for_each_sequence(monkeypatch):
    dpo, data = DPO(ZOO["hf-llama"](0), cache_ref_log_probs=True), dataset()
    plain = DPO(dpo.policy_model, reference=dpo.ref_model)
    dpo(**columns(data, range(7)))
    with torch.no_grad():
        dpo.policy_model.lm_head.weight.mul_(1.1)
    counts = calls_of(monkeypatch)
    for rows in ([3, 1], [0, 2, 4, 5, 6]):
        found = dpo(**columns(data, rows))
        assert id(dpo.reference.scorer) not in counts  # type: ignore[attr-defined]
        torch.testing.assert_close(found, plain(**columns(data, rows)), rtol=1e-5, atol=1e-5)
    # a reference that has changed is computed again
    with torch.no_grad():
        dpo.ref_model.lm_head.weight.mul_(1.2)
    torch.testing.assert_close(dpo(**columns(data, [3, 1])), plain(**columns(data, [3, 1])))
    assert counts[id(dpo.reference.scorer)] == 4  # type: ignore[attr-defined]
    twin = copy.deepcopy(dpo)
    assert len(dpo.reference.cache) == 4 and len(twin.reference.cache) == 0
    assert torch.equal(twin(**columns(data, [3, 1])), dpo(**columns(data, [3, 1])))


# the training command


@pytest.fixture(scope="module")
def without_memory(rows, tmp_path_factory):
    """A run in which the reference is computed each time."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        patch.setattr(LogProbCache, "lookup", lambda self, *arguments: None)
        train(make_config(rows, out))
    return out


@pytest.mark.slow
def test_from_the_second_epoch_on_the_reference_is_not_called(rows, tmp_path, monkeypatch, without_memory):
    counts, step, seen = calls_of(monkeypatch), Trainer.train_step, []

    def watched(self, *args):
        values = step(self, *args)
        if self.stage.name == "dpo":
            seen.append(counts.get(id(self.stage.dpo.reference.scorer), 0))
        return values

    monkeypatch.setattr(Trainer, "train_step", watched)
    train(make_config(rows, tmp_path / "out"))
    half = len(seen) // 2
    assert seen[half - 1] == seen[-1] > 0
    assert_metrics_close(read_metrics(tmp_path / "out"), read_metrics(without_memory))


@pytest.mark.slow
def test_precomputation_trains_alike_without_a_reference(rows, tmp_path, monkeypatch, without_memory):
    stages, step = [], Trainer.train_step

    def watched(self, *args):
        stages.append(self.stage)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", watched)
    out = tmp_path / "out"
    train(make_config(rows, out, precompute_ref_log_probs=True, micro_batch_tokens=1))
    assert stages[-1].dpo.ref_model is None
    assert_metrics_close(read_metrics(out), read_metrics(without_memory))
    parts = [len(list((out / "reference" / name).iterdir())) for name in ("train", "eval")]
    assert parts == [7, 2]  # of three pairs
    assert (
        load_file(out / "model.safetensors").keys() == load_file(without_memory / "model.safetensors").keys()
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["precomputation", "training"])
def test_an_interrupted_run_with_a_cache_resumes(rows, tmp_path, monkeypatch, where):
    options = {"precompute_ref_log_probs": True, "micro_batch_tokens": 1, "save_steps": 2, "ld_alpha": 0.5}
    train(make_config(rows, tmp_path / "whole", **options))
    write_file = precompute.write_file

    def breaks(*args):
        breaks.left -= 1  # type: ignore[attr-defined]
        if breaks.left == 0:  # type: ignore[attr-defined]
            raise InterruptedRunError
        return write_file(*args)

    if where == "training":
        with interrupt_training("dpo", after_steps=5):
            train(make_config(rows, tmp_path / "out", **options))
    else:
        breaks.left = 4  # type: ignore[attr-defined]
        with monkeypatch.context() as patch, pytest.raises(InterruptedRunError):
            patch.setattr(precompute, "write_file", breaks)
            train(make_config(rows, tmp_path / "out", **options))
    monkeypatch.setattr(precompute, "write_file", breaks)
    breaks.left = 0  # type: ignore[attr-defined]
    train(make_config(rows, tmp_path / "out", resume=True, **options))
    count = 6 if where == "precomputation" else 0  # of 9 parts, 3 were there
    assert -breaks.left == count  # type: ignore[attr-defined]
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.pitfall(22)
def test_two_processes_cache_what_one_does(rows, tmp_path, without_memory):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from dpo_wrapper.reference import precompute\n"
        "from dpo_wrapper.pretrained import PRESETS\n"
        "from dpo_wrapper.training.trainer import Trainer\n"
        "from dpo_wrapper.scoring.scorer import Scorer\n"
        "from dpo_wrapper.training.train import train\n"
        "from helpers.runs import SMALL_DECODER, make_config\n"
        "torch.set_num_threads(1)\n"
        "precompute.SEQUENCES_PER_FILE = 6\n"
        "PRESETS['tiny'] = SMALL_DECODER\n"
        "data, out = map(Path, sys.argv[1:])\n"
        "score, step, seen, calls = Scorer.__call__, Trainer.train_step, [], {}\n"
        "def counted(self, *args, **kwargs):\n"
        "    calls[id(self)] = calls.get(id(self), 0) + 1\n"
        "    return score(self, *args, **kwargs)\n"
        "def watched(self, *args):\n"
        "    values = step(self, *args)\n"
        "    if self.stage.name == 'dpo':\n"
        "        seen.append(calls.get(id(getattr(self.stage.dpo.reference, 'scorer', None)), 0))\n"
        "    return values\n"
        "Scorer.__call__, Trainer.train_step = counted, watched\n"
        "for name, ahead in (('first', False), ('ahead', True)):\n"
        "    train(make_config(data, out / name, save_steps=0, precompute_ref_log_probs=ahead,\n"
        "          micro_batch_tokens=1 if ahead else 16384))\n"
        "    if not ahead:\n"
        "        assert seen[len(seen) // 2 - 1] == seen[-1] > 0, seen\n"
    )
    run_in_two_processes(script, rows, tmp_path)
    for name in ("first", "ahead"):
        assert_metrics_close(read_metrics(without_memory), read_metrics(tmp_path / name))
    assert len(list((tmp_path / "ahead" / "reference" / "train").iterdir())) == 7


@pytest.mark.pitfall(25)
def test_options_that_cannot_act_are_refused(rows, tmp_path):
    for options, why in (({"reference": "none"}, "--reference is none"), ({"loss": "simpo"}, "needs none")):
        with pytest.raises(ValueError, match=f"--precompute-ref-log-probs needs a reference, but .*{why}"):
            train(make_config(rows, tmp_path / "out", precompute_ref_log_probs=True, **options))
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="cache_ref_log_probs should be True or False"):
        DPO(ZOO["xt-rotary"](0), cache_ref_log_probs=1)
    assert DPO(ZOO["xt-rotary"](0), loss=Sigmoid()).reference.cache is None
    settings = json.dumps(RunFolder(make_config(rows, Path("x"))).record.settings)
    assert '"precompute_ref_log_probs": false' in settings
