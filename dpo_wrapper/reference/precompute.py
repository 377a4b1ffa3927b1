"""The reference's log-probs of a data set, computed once and kept in files that record what made them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_wrapper.batches.sequences import ScoredSequences
from dpo_wrapper.libraries.tensor_files import apply_umask
from dpo_wrapper.models.batch_dependence import max_independent_length
from dpo_wrapper.reference.cache import LogProbCache
from dpo_wrapper.reference.reference import CachedReference, FrozenModel, ModelReference, Reference
from dpo_wrapper.reference.sharding import gather_tensor
from dpo_wrapper.scoring.scorer import Scorer
from dpo_wrapper.validation import describe_type
from dpo_wrapper.version import __version__

SEQUENCES_PER_FILE = 512
"""A file is written after so many sequences: no more are computed again after an interruption."""


@torch.no_grad()
def precompute_ref_log_probs(
    sequences: Sequence[ScoredSequences],
    model: nn.Module | Reference,
    folder: str | Path,
    *,
    per_token: bool = False,
    progress: Callable[[int], object] | None = None,
) -> CachedReference:
    """The reference's log-probs of all sequences, read from the folder or else computed into it.

    `DPO(policy, reference=precompute_ref_log_probs(...))` then trains without a reference in memory, with the
    losses of the reference itself up to rounding. An interrupted call goes on where it stopped. Several
    processes (`torch.distributed`) that share the folder share the work.

    Args:
        sequences: all that will be trained or evaluated on, one forward pass each, as
            `dpo_wrapper.data.scored_sequences` makes them.
        model: the reference: a language model, as for `DPO`, or the attribute `reference` of a `DPO`.
        folder: where `part-*.safetensors` are kept.
        per_token: keep the log-prob of each scored token, for `ld_alpha`, and not only sums.
        progress: called with the number of sequences after each file, whether computed or found.

    Raises:
        ValueError: log-probs of a sequence depend on its batch; or the folder was made with other weights,
            sequences, dtype, kind of values or version of this package, or cannot be read.
    """
    if not isinstance(sequences, Sequence) or not all(isinstance(x, ScoredSequences) for x in sequences):
        raise TypeError(
            f"sequences should be a list of ScoredSequences, but it is {describe_type(sequences)}: make them "
            "by scored_sequences(examples, micro_batch_tokens)."
        )
    reference = FrozenModel(Scorer(model, share_prefix="auto")) if isinstance(model, nn.Module) else model
    if not isinstance(reference, ModelReference):
        raise ValueError("the reference should have a model to compute log-probs with: give one that has.")

    longest = max((batch.ids.shape[1] for batch in sequences), default=0)
    if longest > (limit := max_independent_length(reference.model)):
        raise ValueError(
            "log-probs that are computed ahead should not depend on the batch that a sequence stands in, but "
            f"those of this model do in batches longer than {limit} tokens, and one has {longest}: leave "
            "precompute_ref_log_probs out, and they are computed in training."
        )
    device = next((p.device for p in reference.model.parameters()), torch.device("cpu"))
    contents = b"".join(content for batch in sequences for content in batch.content_hashes())
    made_with = {
        "weights": hash_tensors(reference.weights()),
        "sequences": hashlib.blake2b(contents, digest_size=16).hexdigest(),
        "dtype": describe_dtype(reference.model, device.type),
        "values": "of tokens" if per_token else "sums",
        "package version": __version__,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = split_into_files(sequences)
    files = [folder / f"part-{k:05d}.safetensors" for k in range(len(parts))]
    for file in sorted(folder.glob("part-*.safetensors")):
        _, metadata = read_file(file)
        changed = [name for name, value in made_with.items() if metadata.get(name) != value]
        if changed:
            raise ValueError(
                f"the cached reference in {folder} was made with other {' and '.join(changed)}: delete the "
                "folder, or name another."
            )

    rank, processes = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for part, file in list(zip(parts, files, strict=True))[rank::processes]:
        if not file.exists():
            cache = LogProbCache(per_token)
            for batch in part:
                moved = batch.to(device)
                cache.store(moved, reference.compute(moved))
            write_file(file, cache, made_with)
        if progress is not None:
            progress(sum(len(batch.length) for batch in part))
    if processes > 1:
        torch.distributed.barrier()
    stored = CachedReference(per_token)
    for file in files:
        stored.load_state_dict(read_file(file)[0])
    return stored


def split_into_files(sequences: Sequence[ScoredSequences]) -> list[list[ScoredSequences]]:
    """The batches of each file."""
    parts: list[list[ScoredSequences]] = []
    count = SEQUENCES_PER_FILE
    for batch in sequences:
        if count >= SEQUENCES_PER_FILE:
            parts.append([])
            count = 0
        parts[-1].append(batch)
        count += len(batch.length)
    return parts


def hash_tensors(tensors: Mapping[str, Any]) -> str:
    """A hash of names, dtypes, shapes and contents; sharded tensors are gathered."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            full = gather_tensor(tensor)
            digest.update(f"{name} {full.dtype} {tuple(full.shape)};".encode())
            content: Any = full.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(content)
    return digest.hexdigest()


def describe_dtype(model: nn.Module, device: str) -> str:
    """What the model computes in: the dtypes of its weights, and autocast's."""
    dtypes = " and ".join(sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()}))
    is_autocast = torch.is_autocast_enabled(device)
    return f"{dtypes} under autocast to {torch.get_autocast_dtype(device)}" if is_autocast else dtypes


def write_file(file: Path, cache: LogProbCache, made_with: dict[str, str]) -> None:
    """Write a file completely or not at all."""
    unfinished = file.with_suffix(".new")
    import_safetensors().torch.save_file(cache.state_dict(), str(unfinished), metadata=made_with)
    apply_umask(unfinished)
    unfinished.replace(file)


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what they were made with."""
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it, and it is computed again.") from error


def import_safetensors() -> Any:
    """The library, or ImportError that names the extra to install."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("precomputing needs safetensors: pip install 'dpo-wrapper[train]'.") from error
    return safetensors
