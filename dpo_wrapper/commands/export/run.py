"""`dpo-wrapper export`: write, read back, compare, and say what came of it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpo_wrapper.commands.export.agreement import Agreement, ExportError
from dpo_wrapper.commands.export.config import ExportConfig, Format
from dpo_wrapper.commands.export.exported import Exported
from dpo_wrapper.commands.export.gguf.writer import write_gguf
from dpo_wrapper.commands.export.merged import write_merged
from dpo_wrapper.commands.export.mlx import write_mlx
from dpo_wrapper.commands.export.ollama.writer import write_ollama
from dpo_wrapper.commands.export.peft_folder import write_peft
from dpo_wrapper.commands.export.place import ExportPlace
from dpo_wrapper.commands.export.record import begin_record, check_unchanged, note_difference, note_verified
from dpo_wrapper.commands.export.requirements import check_requirements
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.commands.export.x_transformers import write_x_transformers
from dpo_wrapper.data.writable import FULL, check_writable, find_errno, refuse_folder
from dpo_wrapper.display.terminal import create_progress_bar, print_line

WRITERS: dict[Format, Callable[[ExportSource, Path, ExportConfig], Exported]] = {
    "peft": write_peft,
    "mlx": write_mlx,
    "x-transformers": write_x_transformers,
    "gguf": write_gguf,
    "ollama": write_ollama,
    "merged": write_merged,
}
"""In the order in which they are written: what merges the adapter comes behind what may need it."""


def run_export(config: ExportConfig) -> int:
    """Write each export, read it back, and print how far it is apart; returns how many differ.

    With --check nothing is written: exports that are there are compared with what they were.

    Raises:
        ValueError, TypeError, OSError, ImportError: one sentence about what cannot be exported.
    """
    formats = [name for name in WRITERS if name in config.to]
    places = {name: ExportPlace(config.out, name) for name in formats}
    if config.check:
        return sum(not check_again(places[name], config, name) for name in formats)
    check_writable(config.out)
    for place in places.values():
        place.check(config.model)
    num_different = 0
    with hide_warnings():
        source = load_source(config, formats)
        for name in formats:
            num_different += not export(source, config, name, places[name], is_last=name == formats[-1])
    return num_different


def check_again(place: ExportPlace, config: ExportConfig, name: Format) -> bool:
    """Say whether an export is what it was when it was verified."""
    try:
        num_files = check_unchanged(place.final, config, name)
    except ExportError as error:
        print_line(f"{name}: {error}")
        return False
    print_line(f"{name}: {place.final} is as it was when it was verified ({num_files} files)")
    return True


def load_source(config: ExportConfig, formats: Sequence[Format]) -> ExportSource:
    """The model with its answers, if it can be exported in all of these forms."""
    with show_label("loading the model"):
        source = ExportSource.load(config)
    if source.was_trained_in_4_bits:
        print_line("the adapter was trained on its base in 4 bits; it is exported for the base before that")
    for name in formats:
        check_requirements(source, name, config)
    with show_label("asking the model"):
        return source.answer(config)


def export(
    source: ExportSource, config: ExportConfig, name: Format, place: ExportPlace, *, is_last: bool
) -> bool:
    """Write one export and read it back; returns whether it agrees, without which it is not put in place."""
    with place.open() as folder, explain_write_errors(config.out):
        record = begin_record(folder, config, name)
        try:
            with show_label(f"writing {name}"):
                exported = WRITERS[name](source, folder, config)
            if is_last:
                source.free_memory()
            with show_label(f"reading {name} back"):
                agreements, missing = exported.read_back(source.outputs)
        except ExportError as error:
            note_difference(folder, record, error)
            place.reject()
            print_line(f"{name}: {place.name_final(str(error))} It is kept in {place.rejected} for a look.")
            return False
        note_verified(folder, record, agreements)
        place.accept()
    print_line(
        "\n".join(place.name_final(line) for line in describe(place.final, exported, agreements, missing))
    )
    return True


def describe(
    folder: Path, exported: Exported, agreements: Sequence[Agreement], missing: Sequence[str]
) -> list[str]:
    """What is printed of a verified export."""
    details = [*(one.words for one in agreements), *missing, *exported.notes]
    return [
        f"{folder.name}: {folder}",
        *(f"  {line}" for line in details),
        *(f"    {line}" for line in exported.usage),
    ]


@contextmanager
def explain_write_errors(out: Path) -> Iterator[None]:
    """The context in which a full disk or a lost right to write is a ValueError in one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:  # that of tokenizers has no class of its own
        if isinstance(error, (PermissionError, SafetensorError)) or find_errno(error) in FULL:
            raise refuse_folder(out, error) from error
        raise


@contextmanager
def hide_warnings() -> Iterator[None]:
    """The context in which libraries do not warn of what may go wrong, for that is found out here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def show_label(label: str) -> Iterator[None]:
    """The context in which a terminal shows what is being done."""
    with create_progress_bar(label, leave=False) as bar:
        bar.refresh()
        yield
