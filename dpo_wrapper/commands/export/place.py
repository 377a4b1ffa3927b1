"""The place of an export: nothing stands there before it is whole and has been read back."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_wrapper.pretrained.model import EXPORT_FILE

UNFINISHED = ".unfinished-exports"
"""A folder in --out. An export has the same name in it as in the end."""


@dataclass(frozen=True)
class ExportPlace:
    """Where an export is written, and where it stands in the end.

    Attributes:
        out: the folder that --out names.
        name: of the format.
    """

    out: Path
    name: str

    @property
    def final(self) -> Path:
        return self.out / self.name

    @property
    def unfinished(self) -> Path:
        return self.out / UNFINISHED / self.name

    @property
    def rejected(self) -> Path:
        """Where an export is kept that differs from the model."""
        return self.out / f"{self.name}.differs"

    @property
    def earlier(self) -> Path:
        """Where an earlier export is while the new one is moved to its place."""
        return self.out / UNFINISHED / f"{self.name}.earlier"

    def check(self, model: str) -> None:
        """Raise ValueError if something stands there that is no export, or the model itself."""
        self.restore()
        for folder in (self.final, self.rejected):
            if not folder.exists():
                continue
            if not folder.is_dir() or (any(folder.iterdir()) and not (folder / EXPORT_FILE).is_file()):
                raise ValueError(
                    f"--out should be a folder without {folder.name}, or with that of an earlier export, but "
                    f"{folder} is something else: name another."
                )
        if self.final.exists() and self.final.resolve() == Path(model).resolve():
            raise ValueError(
                f"--out should be another folder than that of the model, but the export would take the place "
                f"of {model}: name another."
            )

    def restore(self) -> None:
        """Put an earlier export back if a signal came while it was replaced."""
        if self.earlier.exists() and not self.final.exists():
            self.earlier.rename(self.final)

    @contextmanager
    def open(self) -> Iterator[Path]:
        """The context in which an export is written into a new folder, which is removed if it stays there."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        is_new = not self.out.exists()
        try:
            self.unfinished.mkdir(parents=True)
            yield self.unfinished
        finally:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.restore()
            for folder in (self.out / UNFINISHED, self.out)[: 1 + is_new]:
                with suppress(OSError):  # where it holds something
                    folder.rmdir()

    def accept(self) -> None:
        """Move the export to its place, from which an earlier one is removed only then."""
        shutil.rmtree(self.earlier, ignore_errors=True)
        if self.final.exists():
            self.final.rename(self.earlier)
        self.unfinished.rename(self.final)
        for folder in (self.earlier, self.rejected):
            shutil.rmtree(folder, ignore_errors=True)

    def reject(self) -> None:
        """Move the export to where it can be looked at."""
        shutil.rmtree(self.rejected, ignore_errors=True)
        self.unfinished.rename(self.rejected)

    def name_final(self, text: str) -> str:
        """A text in which paths of the unfinished export are those that it has in the end."""
        return re.sub(re.escape(UNFINISHED) + r"[/\\]+", "", text)
