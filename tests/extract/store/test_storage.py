"""Ordinary trouble of a disk where a new store is to be made, in words."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from stillhouse.data.errors import StoreError, UsageError
from stillhouse.extract.maintain.combine import copy


def test_names_and_files_that_the_disk_does_not_take(small_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x: cannot be made: File name too long; give another name"):
        copy(small_store, tmp_path / ("x" * 300))
    with pytest.raises(UsageError, match=r"x: cannot be made: File name too long; give another name"):
        copy(small_store, tmp_path / ("x" * 250))  # The name of its draft is longer.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(StoreError, match=r"a file may not become so large here; raise the limit \(ulimit -f\)"):
            copy(small_store, tmp_path / "limited")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "limited").exists() and not list(tmp_path.glob(".limited*"))
    copy(small_store, tmp_path / "limited")
