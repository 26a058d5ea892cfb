"""What lies where a file should be is told, never waited for."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from hostile import limited

from stillhouse.data.files.atomic import read_plain, sha256_plain


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    (tmp_path / "link").symlink_to("file")
    assert read_plain(tmp_path / "link") == b"abc" * 100_000
    assert sha256_plain(tmp_path / "file") == sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize("read", [read_plain, sha256_plain])
def test_what_is_none_is_an_error_at_once(tmp_path: Path, read) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "pipe", "loop", "nothing", "folder/no/such"):
        with limited(5), pytest.raises(OSError, match=name):
            read(tmp_path / name)
    with limited(5), pytest.raises(OSError):
        read(Path("/dev/tty"))
