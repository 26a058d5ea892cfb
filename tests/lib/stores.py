"""What tests of several folders do to stores.

Invariant: what is changed here is what a store holds as it is, so it finds out by its checksums alone. Used by
tests/extract/test_into_transfer.py and tests/train/loop/test_transfer_run.py.
"""

from __future__ import annotations

from pathlib import Path


def flip(store: Path, held: bytes) -> None:
    """Flip the lowest bit of the last 16-bit number that lies in the store as `held`: it stays finite and small."""
    for path in sorted(store.rglob("*")):
        if path.is_file() and (at := path.read_bytes().find(held)) >= 0:
            with open(path, "r+b") as file:
                file.seek(at + len(held) - 2)
                file.write(bytes([held[-2] ^ 1]))
            return
    raise AssertionError("no file holds these states as they are")
