"""Ask another Python process: it may fail, crash, print or hang, and this one only hears of it.

Invariant: nothing of what is probed is imported here, and no answer takes longer than its limit.
Exercised by: `stillhouse doctor`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

MARK = "stillhouse doctor:"
LIMIT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """`facts` of a program that ended well, else the `error` in one line."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def get(self, name: str) -> Any:
        return self.facts.get(name)


def ask(program: str, limit_s: float = LIMIT_S, **environment: str) -> Answer:
    """Run a program that fills a dict `facts`; -P keeps modules of the current folder out of it."""
    text = f"facts = {{}}\n{program}\nimport json\nprint({MARK!r} + json.dumps(facts))"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", text],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer in {limit_s:g} s")
    except OSError as e:
        return Answer(error=f"cannot start {sys.executable}: {e.strerror}")
    if done.returncode < 0:
        return Answer(error=f"crashed: {_signal(-done.returncode)}")
    said = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not said:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Answer(error=lines[-1] if lines else f"ended with exit code {done.returncode}")
    return Answer(json.loads(said[-1].removeprefix(MARK)))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def together(questions: Sequence[Callable[[], Answer]]) -> list[Answer]:
    """Several at once, as many as there are cores; the answers in order."""
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return list(pool.map(lambda question: question(), questions))
