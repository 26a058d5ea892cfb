"""Completion: what the shells' own protocol gives for commands, view addresses and utterance ids."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from stillhouse.cli import cli


def complete(arguments: list[object], incomplete: str) -> list[str]:
    found = ShellComplete(cli, {}, "stillhouse", "_STILLHOUSE_COMPLETE").get_completions(
        [str(a) for a in arguments], incomplete
    )
    return [item.value for item in found]


def test_commands():
    assert "neighbours" in complete(["inspect"], "ne") and complete([], "insp") == ["inspect"]


def test_views(store):
    both = ["known/both:8/0", "known/both:8/2", "known/both:8/4"]
    assert complete(["inspect", "stats", store.path, "--view"], "known/b") == both
    begun = complete(["inspect", "compare", store.path, "s00-0000", "--views"], "known/alone/4,known/b")
    assert begun == [f"known/alone/4,{v}" for v in both]


def test_utterances(store, tmp_path):
    expected = {"s01-0003", "s01-0004", "s01-0005"}
    assert set(complete(["inspect", "show", store.path], "s01")) == expected
    assert set(complete(["inspect", "neighbours", store.path], "s01")) == expected
    assert complete(["inspect", "show", tmp_path / "none"], "s") == []


@pytest.mark.parametrize(("shell", "expected"), [("bash", "plain,{}"), ("zsh", "plain\n{}\n_"), ("fish", "plain,{}")])
def test_each_shells_protocol(store, shell, expected):
    line = f"stillhouse inspect show {store.path} s00-0002"
    env = {**os.environ, "_STILLHOUSE_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": "4"}
    if shell == "fish":
        env["COMP_WORDS"], env["COMP_CWORD"] = line, "s00-0002"
    done = subprocess.run([sys.executable, "-m", "stillhouse.cli"], env=env, capture_output=True, text=True)
    assert expected.format("s00-0002") in done.stdout, done.stderr
    script = {**os.environ, "_STILLHOUSE_COMPLETE": f"{shell}_source"}
    printed = subprocess.run([sys.executable, "-m", "stillhouse.cli"], env=script, capture_output=True, text=True)
    assert "_STILLHOUSE_COMPLETE" in printed.stdout, printed.stderr


class Terminal:
    """Run a shell in a terminal and type into it."""

    def __init__(self, *command: str, cwd: Path) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            os.environ |= {"PS1": "$ ", "TERM": "dumb", "HOME": str(cwd)}
            os.execvp(command[0], command)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 400, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, *texts: str, seconds: float = 60) -> str:
        """What is printed until all of these were."""
        shown, until = "", time.monotonic() + seconds
        while not all(t in shown for t in texts):
            left = until - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], f"{texts} not in {shown!r}"
            shown += os.read(self.fd, 65536).decode(errors="replace")
        return shown

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)


def of_docs(language: str) -> str:
    """Return the lines for the shell's settings from docs/reference/inspect.md."""
    text = (Path(__file__).parents[3] / "docs" / "reference" / "inspect.md").read_text(encoding="utf-8")
    return "; ".join(text.split(f"```{language} quick\n")[1].split("```")[0].strip().splitlines())


@pytest.mark.parametrize(("shell", "options"), [("bash", ["--norc", "-i"]), ("zsh", ["-f", "-i"])])
def test_in_a_real_shell(store, tmp_path, shell, options):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "s.zarr").symlink_to(store.path)
    terminal = Terminal(shell, *options, cwd=tmp_path)
    try:
        settings = of_docs(shell).replace("&& compinit", "&& compinit -u")  # not the shell's own folders' owners
        terminal.type(f"{settings}; echo rea''dy\r")
        terminal.wait_for("ready")
        # Where several are left, bash lists them at the second tab, zsh at the first
        terminal.type("stillhouse inspect show s.zarr s01-000" + ("\t\t" if shell == "bash" else "\t"))
        terminal.wait_for("s01-0003", "s01-0004", "s01-0005")
        terminal.type("3 --view known/bo\t")  # as far as all of them go
        terminal.wait_for("th:8/")
        terminal.type("2\r")
        terminal.wait_for("norm of each state")
    finally:
        terminal.close()


def test_in_a_real_fish(store, tmp_path):
    """fish can print its completions itself."""
    if shutil.which("fish") is None:
        pytest.skip("no fish here")
    (tmp_path / "s.zarr").symlink_to(store.path)

    def told(line: str) -> list[str]:
        program = f'{of_docs("fish")}; complete -C "{line}"'
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        done = subprocess.run(
            ["fish", "--no-config", "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        return [line.split("\t")[0] for line in done.stdout.splitlines()]

    assert set(told("stillhouse inspect show s.zarr s01-")) == {"s01-0003", "s01-0004", "s01-0005"}
    assert told("stillhouse inspect show s.zarr s01-0003 --view known/both") == [f"known/both:8/{k}" for k in (0, 2, 4)]
