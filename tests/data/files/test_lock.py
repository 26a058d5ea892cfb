"""A lock has one holder at a time, on the current file, and ends with its process."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from stillhouse.data.errors import LockedError, UsageError
from stillhouse.data.files.lock import FileLock


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "new" / "lock"), FileLock(tmp_path / "new" / "lock", "store")
    assert first.acquire() and not second.acquire()
    with pytest.raises(LockedError, match="another process is writing the store"), second:
        pass
    first.release()
    first.release()
    with second:
        assert not first.acquire()
    assert first.acquire()
    first.release()


def test_a_waiting_process_gets_the_file_that_is_there_now(tmp_path: Path) -> None:
    """The holder deletes the file that the other one waits for: that one must not hold a file without a name."""
    path = tmp_path / "lock"
    first, second = FileLock(path), FileLock(path, wait=True)
    assert first.acquire()
    entered = threading.Event()

    def enter() -> None:
        with second:
            assert not FileLock(path).acquire()
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    path.unlink()
    first.release()
    thread.join(30)
    assert entered.is_set()


def test_a_folder_can_be_locked(tmp_path: Path) -> None:
    with FileLock(tmp_path):
        assert not FileLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    come, says_come = os.pipe()
    child = os.fork()
    if child == 0:
        FileLock(tmp_path / "lock").acquire()
        os.write(says_come, b".")
        signal.pause()
    assert os.read(come, 1) and not FileLock(tmp_path / "lock").acquire()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with FileLock(tmp_path / "lock"):
        pass
    os.close(come)
    os.close(says_come)


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("gone/lock")
    for path in (tmp_path / "file" / "lock", tmp_path / "link"):
        with pytest.raises(UsageError, match="cannot write here"), FileLock(path):
            pass


def test_a_process_forked_under_the_lock_does_not_hold_it(tmp_path: Path) -> None:
    (come, says_come), (go, says_go) = os.pipe(), os.pipe()
    with FileLock(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            os.close(says_go)
            os.write(says_come, b".")
            os.read(go, 1)  # until the parent says so
            os._exit(0)
        assert os.read(come, 1)
        with pytest.raises(LockedError), FileLock(tmp_path / "lock"):
            pass
    with FileLock(tmp_path / "lock"):
        pass
    os.write(says_go, b".")
    assert os.waitpid(child, 0)[1] == 0
    for end in (come, says_come, go, says_go):
        os.close(end)
