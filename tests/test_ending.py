"""The end of a command: nothing is freed, everything that was registered is done, and the exit code stays."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

CHILD = """
import atexit, sys
from stillhouse.cli import main
class Late:
    def __del__(self):
        print("freed")
late = Late()
late.itself = late
atexit.register(print, "registered before")
sys.argv[0] = "stillhouse"
try:
    main()
finally:
    atexit.register(print, "registered after")
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["train"], 2), (["corpus", "info", "/no"], 2)])
def test_a_command_ends_without_freeing_memory(arguments: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert "registered after" in done.stdout
    assert "freed" not in done.stdout
    assert ("error" in done.stderr.lower()) == (code != 0)


def test_a_full_disk_at_the_end_is_no_success() -> None:
    child = CHILD.replace("print, ", "print, 'x' * 9, ")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", child, "--version"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_after_a_command_has_done_its_work_changes_no_exit_code(name: str) -> None:
    """Threads and libraries take seconds to end, in which a scheduler's signal may come."""
    kill = f"__import__('os').kill, __import__('os').getpid(), {int(getattr(signal, name))}"
    child = CHILD.replace('print, "registered after"', kill)
    done = subprocess.run([sys.executable, "-c", child, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
