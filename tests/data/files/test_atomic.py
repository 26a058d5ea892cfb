"""Files are replaced whole or not at all. A pipe in the place of a file is an error at once."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from hostile import limited

from stillhouse.data.files.atomic import draft_of, read_plain, sha256_plain, sweep_drafts, write_atomic


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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for durable in (True, False):
        write_atomic(path, "über\n", durable=durable)
        write_atomic(path, memoryview(b"new"), durable=durable)
        with pytest.raises(ZeroDivisionError), draft_of(path, durable=durable) as draft:
            draft.write_bytes(b"half")
            assert path.read_bytes() == b"new"
            raise ZeroDivisionError
        assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "gone" / "file", b"")


def test_a_draft_lies_where_it_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "drafts").mkdir()
    with draft_of(tmp_path / "a.svg", folder=tmp_path / "drafts", suffix=".svg") as draft:
        draft.write_bytes(b"<svg/>")
        assert draft.parent == tmp_path / "drafts" and draft.suffix == ".svg"
    assert (tmp_path / "a.svg").read_bytes() == b"<svg/>" and not any((tmp_path / "drafts").iterdir())


def test_drafts_of_killed_processes_are_swept(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with draft_of(tmp_path / "file") as draft:
            draft.write_bytes(b"half")
            os._exit(0)
    os.waitpid(child, 0)
    kept = [".file", ".file.tmp", ".hidden.notadraft.tmp"]
    for name in kept:
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == len(kept) + 1
    sweep_drafts(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_an_error_names_the_file_and_not_its_draft(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(OSError) as caught:
        write_atomic(tmp_path / "a" / "b", b"")
    assert caught.value.filename == str(tmp_path / "a" / "b")
