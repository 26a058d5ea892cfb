"""Ordinary trouble is told in words: which file, what is wrong, and what to do. None of it is unexpected."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.data.files.atomic import draft_of, named, usual_mode, write_atomic
from stillhouse.data.files.trouble import TROUBLE, in_words, os_error
from stillhouse.data.manifest import Utterance, write_manifest


@pytest.mark.parametrize("number", TROUBLE)
def test_every_number_names_the_file_and_a_remedy(tmp_path: Path, number: int) -> None:
    error = in_words(OSError(number, os.strerror(number), str(tmp_path / "f")))
    assert error is not None
    assert str(tmp_path / "f") in str(error)
    assert TROUBLE[number][0] in str(error)
    assert error.remedy
    assert error.exit_code == 1


def test_a_full_disk_says_how_much_is_free(tmp_path: Path) -> None:
    text = str(in_words(OSError(errno.ENOSPC, "", str(tmp_path / "not" / "there"))))
    assert " MB are free)" in text
    assert "repeat the command" in text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 1.36 PiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_by_all_its_names(error: Exception) -> None:
    text = str(in_words(error))
    assert text.startswith("there is too little memory")
    assert "ulimit -v" in text


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.12: cannot open shared object file: No such file or directory"),
        OSError("/lib/libtorch_cpu.so: undefined symbol: iJIT_NotifyEvent"),
        ImportError("/lib/x.so: invalid ELF header", name="x"),
        ImportError("/lib/libm.so.6: version `GLIBC_2.38' not found (required by x.so)"),
        ImportError("cannot import name 'a' from 'torch' (/lib/torch)", name="torch"),
    ],
)
def test_libraries_that_cannot_be_loaded(error: Exception) -> None:
    text = str(in_words(error))
    assert text.startswith("a library cannot be loaded: ") and str(error)[:30] in text and "stillhouse doctor" in text


def test_packages_that_are_missing() -> None:
    error = ModuleNotFoundError("No module named 'soundfile'", name="soundfile")
    assert str(in_words(error)).startswith("the package soundfile is not installed; stillhouse doctor")
    assert in_words(ModuleNotFoundError("No module named 'stillhouse.x'", name="stillhouse.x")) is None


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shapes differ"), OSError("no number"), KeyError("a")])
def test_other_errors_stay_unexpected(error: Exception) -> None:
    assert in_words(error) is None


def test_what_a_library_hides_in_its_text(tmp_path: Path) -> None:
    hidden = os_error(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path)
    assert hidden is not None and (hidden.errno, hidden.filename) == (errno.ENOSPC, str(tmp_path))
    hidden = os_error(RuntimeError("can't write data (file write failed: errno = 28, error message = …)"), tmp_path)
    assert hidden is not None and hidden.errno == errno.ENOSPC
    assert os_error(RuntimeError("28"), tmp_path) is None


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    """An OSError of a write names none, and that of a draft names what it would have become."""
    for raised in (None, str(tmp_path / "other")):
        with pytest.raises(OSError, match="No space") as caught, draft_of(tmp_path / "file"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([raised] if raised else []))
        assert caught.value.filename == (raised or str(tmp_path / "file"))
    with pytest.raises(OSError, match="full"), named(Path("/dev/full")), open("/dev/full", "w") as full:
        full.write("x" * 100_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o027, 0o077])
def test_files_get_the_mode_that_the_umask_asks_for(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with usual_mode(tmp_path / "a"):
            (tmp_path / "a").unlink()
            os.close(os.open(tmp_path / "a", os.O_CREAT | os.O_WRONLY, 0o600))
        write_atomic(tmp_path / "b", "x")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_standard_output(tmp_path: Path, options: tuple[str, ...]) -> None:
    write_manifest(tmp_path / "corpus.jsonl", [Utterance(id="a", text="b")])
    command = [sys.executable, "-m", "stillhouse.cli", "corpus", "info", str(tmp_path / "corpus.jsonl"), *options]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output: no space is left")
    assert done.stderr.count("\n") == 1  # neither a traceback nor "Exception ignored"


def test_what_libraries_in_rust_say_of_a_full_disk() -> None:
    class SafetensorError(Exception):
        pass

    text = str(in_words(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")))
    assert text.startswith("no space is left on the file system; free some space there")
    assert in_words(SafetensorError("Error while deserializing header: invalid header")) is None
