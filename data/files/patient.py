"""A file for HDF5, whose library crashes the process if a file cannot be written when it is closed.

Guarantees: no write raises. The first error is raised by `close`, so a full disk is an OSError.
Try: `stillhouse corpus features corpus.jsonl features.h5` on a full disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any


class PatientFile(FileIO):
    """A new file to write, also with h5py. After an error, writes do nothing, and `close` raises the error."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all bytes of `data`, unless a write failed before."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        with self._kept():
            while len(rest) and self.error is None:
                rest = rest[super().write(rest) :]
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file, unless a write failed before."""
        with self._kept():
            if self.error is None:
                super().truncate(size)
        return self.tell() if size is None else size

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self.error = e

    def close(self) -> None:
        """Close the file. Raises the first OSError of a write."""
        super().close()
        error, self.error = self.error, None
        if error is not None:
            raise error
