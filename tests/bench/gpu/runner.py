"""Run parts of a benchmark in processes of their own, so that a crash, a hang or a lack of memory costs one row.

A part is a list of named rows. Its process says which row it begins and what came of it. If it dies or a row takes too
long, that row is reported, and a new process goes on behind it.
Guarantees: each row of each part is in the table, whatever happens to the others. The table is whole at any moment.
Try: `pytest tests/bench/test_gpu.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from stillhouse.data.files.atomic import write_atomic

OK, ABSENT, QUOTED = "ok", "not here", "published"  # needs what this machine does not have; measured by others


@dataclass
class Row:
    """One line of the table. `floor_ms` is the least time on paper, and `facts` are for later parts."""

    what: str = ""
    state: str = OK
    ms: float | None = None
    floor_ms: float | None = None
    bound: str = ""
    peak_mb: float | None = None
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.state in (OK, ABSENT, QUOTED)


class Unable(Exception):
    """Raised by a row that this machine has no means for. The text says what is missing."""


Rows = Iterable[tuple[str, Callable[[], Row | None]]]

# --- in the process of a part ---


def work(
    rows: Rows,
    done: Sequence[str],
    out: IO[str],
    alive: Callable[[], bool] = lambda: True,
    advice: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run the rows whose names are not in `done`, and write what comes of them to `out` as JSON lines.

    After an error, `alive` says whether the device still answers. If it does not, the process ends, and its successor
    has a new context. `advice` says by name what to do about a row that is not well.
    """

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    rows = list(rows)
    assert len({name for name, _ in rows}) == len(rows), "two rows of one name"
    say(all=[name for name, _ in rows], advice=dict(advice))
    for name, run in rows:
        if name in done:
            continue
        say(begin=name)
        try:
            row = run() or Row()
        except Unable as e:
            row = Row(state=ABSENT, note=str(e))
        except BaseException as e:  # Whatever it is, the next row has its turn.
            traceback.print_exc()
            memory = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"
            row = Row(state="out of memory" if memory else "failed", note=first_line(e))
        row.what = row.what or name
        say(row=asdict(row), name=name)
        if not row.holds and not alive():
            return


def first_line(e: BaseException) -> str:
    """Return the type of an error and the first line of its text."""
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0]}" if lines else type(e).__name__


def own_channel() -> IO[str]:
    """Return a file for the messages. All else that is printed goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


# --- beside it ---


def run_part(
    command: Sequence[str],
    row_s: float,
    deadline: float = float("inf"),
    environment: dict[str, str] | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Return the rows of a part, whose process is `command` and the names of the rows that are done, as JSON.

    A row may take `row_s` seconds, and so may the start of the process. None of them runs on after `deadline`, by
    time.monotonic. `on_row` gets each row as soon as it is known.
    """
    names: list[str] = []
    advice: dict[str, str] = {}
    rows: dict[str, Row] = {}

    def add(name: str, row: Row) -> None:
        if not row.holds and name in advice:
            row.note += f" → {advice[name]}"
        rows[name] = row
        on_row(row)

    while not names or any(name not in rows for name in names):
        process, begun, before = _Process([*command, json.dumps(list(rows))], environment), None, len(rows)
        try:
            while message := process.next(min(row_s, deadline - time.monotonic())):
                names, advice = message.get("all", names), message.get("advice", advice)
                begun = message.get("begin")
                if "row" in message:
                    add(message["name"], Row(**message["row"]))
            state, why = "crashed", process.ended()
        except TimeoutError:
            state, why = "too slow", f"no result in {row_s:g} s"
        finally:
            process.kill()
        if time.monotonic() >= deadline:
            break
        if begun is not None or (why and len(rows) == before):
            add(begun or "start", Row(begun or "start", state, note=why))
        if len(rows) == before or "start" in rows:
            break
    late = time.monotonic() >= deadline
    for name in names or ["start"] * late:
        if name not in rows:
            add(name, Row(name, "not run", note="no time left" if late else "the process of the part ended before"))
    return list(rows.values())


class _Process:
    """A process in a group of its own, and the messages that it writes."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, closed by `kill`
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1", **(environment or {})}, text=True, errors="replace",
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def next(self, limit: float) -> dict[str, Any] | None:
        """Return the next message, or None when the process has ended. Raises TimeoutError after `limit` seconds."""
        try:
            line = self.lines.get(timeout=max(0.0, limit))
        except queue.Empty:
            if self.process.poll() is None:
                raise TimeoutError from None
            return None  # It has ended, and a process that it started still holds the pipe.
        return None if line is None else json.loads(line)

    def ended(self) -> str:
        """Return why the process ended, "" if as it should."""
        code = self.process.wait()
        if code == 0:
            return ""
        how = f"ended with exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as the system does when memory runs out"
        self.errors.seek(0)
        lines = [s.strip() for s in self.errors.read().decode(errors="replace").splitlines() if s.strip()]
        # With a crash, Python writes "Fatal Python error: …" and a list of frames.
        told = [s for s in lines if s.startswith("Fatal Python error")] or lines[-1:]
        return f"{how}: {told[0]}" if told else how

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(5)  # It ends with the last process that holds the pipe.
        if not self.reader.is_alive():
            self.process.stdout.close()
        self.errors.close()


# --- the table ---


@dataclass
class Section:
    """A part in the report: its title, how to read it, and its rows, of which there are none before it has run."""

    title: str
    about: str
    rows: list[Row] = field(default_factory=list)


def as_table(rows: Sequence[Row]) -> list[str]:
    """Return rows as a table in Markdown, without the columns that none of them has."""

    def number(value: float | None, form: str = ".3g") -> str:
        return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else format(value, form)

    def over(r: Row) -> str:
        return number(r.ms / r.floor_ms) if r.ms and r.floor_ms else ""

    columns: dict[str, tuple[str, Callable[[Row], str]]] = {
        "what": ("---", lambda r: r.what),
        "result": ("---", lambda r: r.state if r.holds else f"**{r.state}**"),
        "ms": ("--:", lambda r: number(r.ms)),
        "floor, ms": ("--:", lambda r: number(r.floor_ms)),
        "ms / floor": ("--:", over),
        "floor by": ("---", lambda r: r.bound),
        "peak MB": ("--:", lambda r: number(r.peak_mb, ".1f")),
        "remark": ("---", lambda r: r.note),
    }
    shown = {name: c for name, c in columns.items() if name in ("what", "result") or any(c[1](r) for r in rows)}
    lines = [shown, [rule for rule, _ in shown.values()], *([cell(r) for _, cell in shown.values()] for r in rows)]
    return ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines]


def _escaped(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def write_report(path: Path, head: Sequence[str], sections: Sequence[Section]) -> None:
    """Write the report: `head`, how many rows are well, and the sections. A reader never sees half of it."""
    rows = [r for s in sections for r in s.rows]
    own = [r for r in rows if r.state != QUOTED]
    missing = [s.title for s in sections if not s.rows]
    lines = [*head, "", f"{sum(r.state == OK for r in own)} of {len(own)} rows are ok."]
    if bad := [f"{r.what}: {r.state}" for r in rows if not r.holds]:
        lines += ["", "Not ok: " + "; ".join(map(_escaped, bad)) + "."]
    if missing:
        lines += ["", "Not run yet: " + ", ".join(missing) + "."]
    for s in sections:
        if s.rows:
            lines += ["", f"## {s.title}", "", s.about, "", *as_table(s.rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(lines) + "\n")


def report_line(row: Row) -> str:
    """Return a row as a line for the terminal."""
    ms = "" if row.ms is None else f"{row.ms:.3g} ms"
    return "  ".join(filter(None, [f"{row.state:<9}", row.what, ms, row.note]))
