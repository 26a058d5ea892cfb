"""The files of one store: how they come to this disk before they are read, and where they go after they are written.

`StoreFiles` is the interface, and its form for a store in a folder. `remote/files.py` has the form for object stores.

Guarantees: whether a store is remote is asked in `store/storage.py` alone. Everybody else calls these methods.
Try: `pytest tests/extract/store/test_remote.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ....data.files.atomic import plain_descriptor
from .durable import read_json

T = TypeVar("T")


class BlockReader(Protocol):
    """A file that is read in blocks instead of through a memory map."""

    size: int
    where: str  # for messages

    def ask(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Begin to fetch ranges (offset, bytes)."""

    def read(self, into: memoryview, offset: int) -> int:
        """Fill `into` from `offset` on and return the bytes read, fewer at the end of the file."""

    def renew(self, offset: int, size: int) -> bool:
        """Fetch a range again, and return whether other bytes came than this disk had."""


class StoreFiles:
    """The files of a store in the folder `root` on a disk."""

    has_locks = True  # Writers of the store see each other's file locks.
    can_be_torn = True  # A file may be there in part.
    writable = True
    fills_disk = True  # The store grows on the disk where `root` is.
    is_copied = False  # What is read are copies on this disk, which may be damaged where the store is not.
    renewed: Sequence[str] = ()  # what was damaged in the copies on this disk alone, and was fetched again

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def address(self) -> str:
        """The path or URL of the store, as one would type it."""
        return str(self.root)

    def place(self, path: Path) -> str:
        """The path or URL of one file, for messages."""
        return str(path)

    # --- reading ---

    def local(self, path: Path) -> Path:
        """Bring a file to this disk and return where it is. It may not exist."""
        return path

    def read_json(self, path: Path) -> Any:
        """Return what a JSON file holds. Raises as `durable.read_json`."""
        return read_json(self.local(path), self.place(path))

    def record_names(self, folder: Path) -> list[str]:
        """Return the names of a folder's files, in order, and bring those that are records to this disk."""
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def sizes(self, folder: Path) -> Iterator[tuple[Path, int]]:
        """Yield every file under a folder with its bytes, without those that a writer removes meanwhile."""
        pending = [str(folder)]
        while pending:
            try:
                entries = list(os.scandir(pending.pop()))
            except FileNotFoundError:
                continue
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        yield Path(entry.path), entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue

    def empty_folders(self) -> list[Path]:
        """Return the folders directly below the store that hold nothing."""
        return [p for p in self.root.iterdir() if p.is_dir() and not any(p.iterdir())]

    def count_files(self, folder: Path) -> int | None:
        """Return how many files are under a folder; None where counting costs a request."""
        return sum(1 for p in folder.rglob("*") if p.is_file())

    def blocks(self, path: Path) -> BlockReader | None:
        """Return a reader of a shard file that is not on this disk, or None to open it as a file."""
        return None

    def descriptor(self, path: Path, whole: bool) -> int:
        """Open a regular shard file and return its descriptor; without `whole`, only the end must be readable."""
        return plain_descriptor(path)

    def renew(self, path: Path, whole: bool) -> bool:
        """Fetch a shard file, or without `whole` its end, again. Return whether other bytes came than this disk had."""
        return False

    def forget(self, folder: Path) -> bool:
        """Forget the copies on this disk of files in a folder, and return whether there were any."""
        return False

    def note_renewed(self, path: Path) -> None:
        """Remember in `renewed` that a file was damaged on this disk alone."""

    def revalidate(self) -> None:
        """Forget copies on this disk of files that have been replaced since."""

    # --- writing ---

    def free_bytes(self) -> int:
        """Return the free bytes of the disk where `root` is or will be."""
        folder = self.root.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def require_writable(self) -> None:
        """Raise StoreError where nothing can be changed through this object."""

    def require_growable(self) -> None:
        """Raise UsageError where rows cannot be added to arrays that exist."""

    def retry_plan(self, make_plan: Callable[[], T]) -> T:
        """Return what `make_plan` returns. In an object store it runs again where another writer planned first."""
        return make_plan()

    def publish_plan(self, by: str = "") -> None:
        """Make the plan that has been written here the store's; `by` names an undertaking of several commands."""

    def publish_commit(self, record: Path, data: list[Path], values: dict[str, Any] | None, overwrite: bool) -> bool:
        """Make a commit record, and the files `data` that it speaks of, part of the store. False: another was first.

        `values` are the item's parts of shared arrays, by name; None for norms. `overwrite` replaces files of earlier
        generations.
        """
        return True

    def publish_arrays(self, paths: Iterable[Path]) -> None:
        """Make shared arrays whole for readers that know Zarr alone."""
