"""A written export, and how it is read back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_wrapper.commands.export.agreement import (
    Agreement,
    PromptOutput,
    Reader,
    UnreadableError,
    compare,
)


@dataclass(frozen=True)
class Check:
    """A program that reads an export back.

    Attributes:
        open_reader: loads the export; None in its place where the program is not installed.
        tolerance: the largest difference of logits, relative to their spread, that is rounding.
        missing: what to install, where the program is missing.
        outputs: what the export should say; None for what the model says.
    """

    open_reader: Callable[[], Reader] | None
    tolerance: float
    missing: str = ""
    outputs: tuple[PromptOutput, ...] | None = None


@dataclass(frozen=True)
class Exported:
    """A folder that was written, which nobody should use before it is read back.

    Attributes:
        checks: the programs that read it back, at least one of which is there.
        usage: lines that a user runs or writes to use the export.
        notes: sentences on what a user should know.
    """

    folder: Path
    checks: Sequence[Check]
    usage: Sequence[str] = ()
    notes: Sequence[str] = ()

    def read_back(self, outputs: Sequence[PromptOutput]) -> tuple[list[Agreement], list[str]]:
        """How far each program's results are apart from the model's, and sentences on missing programs.

        Raises:
            ExportError: they are too far apart.
        """
        agreements, missing = [], []
        for check in self.checks:
            if check.open_reader is None:
                missing.append(check.missing)
                continue
            try:
                reader = check.open_reader()
            except UnreadableError as error:
                missing.append(str(error))
                continue
            try:
                agreement = compare(check.outputs or outputs, reader, check.tolerance)
            finally:
                reader.close()
            agreement.check()
            agreements.append(agreement)
        assert agreements, "an export that nothing has read"
        return agreements, missing
