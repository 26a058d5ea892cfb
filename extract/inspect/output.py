"""Files that `inspect` writes: a path is checked before the work, and a file is written whole or not at all.

Guarantees: an existing file is replaced with `force` only, and a kill leaves the old file or the new one.
Try: `stillhouse inspect export STORE states.npz`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...data.errors import StoreError, UsageError
from ...data.files.atomic import draft_of
from ...data.files.outputs import refuse_input
from ...data.files.trouble import not_written


def check_output(path: Path, suffixes: Iterable[str], force: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Check that a file may be written.

    Raises UsageError for another suffix, if it exists without `force`, or if it is one of `inputs` or inside of it.
    """
    refuse_input(path, map(Path, inputs), inside=True)
    if path.suffix not in suffixes:
        name = path.suffix or "a file without suffix"
        raise UsageError(f"cannot write {name}", where=path, expected=", ".join(suffixes))
    if path.exists() and not force:
        raise UsageError("this file exists already", where=path, remedy="remove it or give --force")


@contextmanager
def output_draft(path: Path) -> Iterator[Path]:
    """Yield the path of a draft that replaces `path` at the end. Raises StoreError if it cannot be written."""
    try:
        with draft_of(path, suffix=path.suffix, durable=False) as draft:
            yield draft
    except OSError as e:
        raise not_written(StoreError, e, path) from e
