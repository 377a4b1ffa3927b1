"""The reference's log-probs of a whole data set, computed once and kept in files that know what made them."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import Ids, ScoredSequences
from dpo_wrapper.data import Entry, PreferenceDataset, TokenList, TokenPair
from dpo_wrapper.data.groups import micro_batches
from dpo_wrapper.dpo import DPO
from dpo_wrapper.models.eval_mode import eval_mode
from dpo_wrapper.reference.cache import CachedReference, Recall
from dpo_wrapper.scoring.scorer import Scorer
from dpo_wrapper.validation import kind
from dpo_wrapper.version import __version__

PART = 256
"""Entries in one file: no more than these are computed again after an interruption."""

Score = Callable[[ScoredSequences], Tensor]


@torch.no_grad()
def cache_reference(
    dataset: PreferenceDataset | Sequence[Entry],
    model: nn.Module,
    folder: str | Path,
    *,
    token_scores: bool = False,
    max_tokens: int = 16384,
    progress: Callable[[int], object] | None = None,
) -> CachedReference:
    """The reference's log-probs of every sequence of a data set, from `folder` or, where missing, computed.

    `DPO(policy, reference = cache_reference(...))` then trains without a reference in memory, with the losses
    of the reference itself up to rounding. An interrupted call goes on where it stopped. With several
    processes (`torch.distributed`) that share the folder, each computes a part.

    Args:
        dataset: what will be trained or evaluated on: pairs, or what `dpo_wrapper.data` encodes of any kind.
        model: the reference: a language model, as for `DPO`, or a `DPO`, whose reference it is then.
        folder: where `part-*.safetensors` are kept, one for every 256 pairs.
        token_scores: keep the log-prob of each scored token, for `ld_alpha`, and not only sums.
        max_tokens: unique tokens per forward pass.
        progress: called with the number of pairs after each part, whether computed or found.

    Raises:
        ValueError: the folder was made with other weights, token ids, scored tokens, dtype, kind of values or
            version of this package; or it cannot be read.
    """
    entries = dataset.pairs if isinstance(dataset, PreferenceDataset) else dataset
    if not isinstance(entries, Sequence) or not all(isinstance(x, (TokenPair, TokenList)) for x in entries):
        raise TypeError(
            f"cache_reference takes a PreferenceDataset or a list of what is in one, not {kind(dataset)}: "
            "make one of the pairs."
        )
    weights, device = weights_of(model)
    keys = {**keys_of(entries), "weights": weights, "dtype": dtype_of(model, device)}
    keys |= {"values": "of tokens" if token_scores else "sums", "package version": __version__}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(entries), PART)
    files = [folder / f"part-{k:05d}.safetensors" for k in range(len(starts))]
    for file in sorted(folder.glob("part-*.safetensors")):
        check_keys(file, keys)

    rank, processes = place_among_processes()
    with scoring(model) as score:
        for start, file in list(zip(starts, files, strict=True))[rank::processes]:
            part = entries[start : start + PART]
            if not file.exists():
                write(file, computed(part, score, token_scores, max_tokens, device), keys)
            if progress is not None:
                progress(len(part))
    if processes > 1:
        torch.distributed.barrier()
    cached = CachedReference(per_token=token_scores)
    for file in files:
        cached.load_state_dict(read(file)[0])
    return cached


def computed(
    entries: Sequence[Entry], score: Score, token_scores: bool, max_tokens: int, device: torch.device
) -> Recall:
    """The values of all sequences of some entries."""
    found = Recall(per_token=token_scores)
    for group in micro_batches(entries, max_tokens):
        whole = [pair for k in group for pair in sequences_of(entries[k])]
        sequences = ScoredSequences.from_lists(*zip(*whole, strict=True)).to(device)
        scores = score(sequences)
        found.keep(sequences, scores if token_scores else sequences.sums(scores))
    return found


def sequences_of(entry: Entry) -> list[tuple[Ids, Ids]]:
    """A prompt with each of its completions, and with the one of another prompt where there is one."""
    mismatched = [entry.mismatched] if isinstance(entry, TokenList) and entry.mismatched else []
    return [(entry.prompt, completion) for completion in (*entry.completions, *mismatched)]


@contextmanager
def scoring(model: nn.Module) -> Iterator[Score]:
    """What scores tokens under the reference, in eval mode."""
    if isinstance(model, DPO):
        model.settle()
        scorer, context = model.score_reference, model.reference.still()
    else:
        scorer, context = Scorer(model, share="auto"), eval_mode(model)

    def score(sequences: ScoredSequences) -> Tensor:
        scorer.check(sequences)
        return scorer.token_scores(sequences)

    with context:
        yield score


# what made the values


def weights_of(model: nn.Module) -> tuple[str, torch.device]:
    """A hash of the reference's weights, and the device that they are on."""
    left_out: set[str] = set()
    if isinstance(model, DPO):
        if model.ref_model is None and model.reference.adapter_of is None:
            raise ValueError("this DPO has no reference model to compute log-probs with: give one that has.")
        if model.ref_model is None:  # the policy without its adapter, which is all that trains
            policy = model.policy_model
            left_out = {name for name, p in policy.named_parameters() if p.requires_grad}
            model = policy
        else:
            model = model.ref_model
    state = {name: value for name, value in model.state_dict().items() if name not in left_out}
    devices = [p.device for p in model.parameters()]
    return hash_of(state), devices[0] if devices else torch.device("cpu")


def hash_of(state: Mapping[str, Any]) -> str:
    """A hash of names, dtypes, shapes and contents."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name]
        if isinstance(value, Tensor):
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)};".encode())
            raw: Any = whole.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(raw)
    return digest.hexdigest()


def keys_of(entries: Sequence[Entry]) -> dict[str, str]:
    """Hashes of the ids of all sequences, and of which of them are scored."""
    ids, scored = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    for entry in entries:
        for prompt, completion in sequences_of(entry):
            ids.update(array("q", [len(prompt) + len(completion), *prompt, *completion]).tobytes())
            scored.update(array("q", [len(prompt)]).tobytes())
    return {"token ids": ids.hexdigest(), "scored tokens": scored.hexdigest()}


def dtype_of(model: nn.Module, device: torch.device) -> str:
    """What the model computes in: the dtypes of its weights, and autocast's."""
    if isinstance(model, DPO):
        model = model.policy_model if model.ref_model is None else model.ref_model
    names = " and ".join(sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()}))
    if torch.is_autocast_enabled(device.type):
        names += f" under autocast to {torch.get_autocast_dtype(device.type)}"
    return names


def place_among_processes() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


# files


def write(file: Path, values: Recall, keys: dict[str, str]) -> None:
    """A whole file or none."""
    library().save_file(values.state_dict(), str(unfinished := file.with_suffix(".new")), metadata=keys)
    unfinished.replace(file)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    library()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it, and it is computed again.") from error


def check_keys(file: Path, keys: dict[str, str]) -> None:
    """Refuse a file that something else made."""
    _, made = read(file)
    changed = [name for name, value in keys.items() if made.get(name) != value]
    if changed:
        raise ValueError(
            f"the cached reference in {file.parent} was made with other {' and '.join(changed)}: delete the "
            "folder, or name another."
        )


def library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("cache_reference needs safetensors: pip install 'dpo-wrapper[train]'.") from error
    return safetensors.torch
