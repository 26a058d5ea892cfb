"""Run by test_killed_anywhere.py: trains in forked children, one of them undisturbed, the others killed anywhere.

    kill_child.py CONFIG OUT CASES     CASES: JSON, [[name, [changes], kills, seed], …]

OUT/NAME/whole is the undisturbed run, OUT/NAME/killed the other. Prints a JSON line a case: what the children said, and
what lay in the run's folder after each kill.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer

DRAFTS = ("checkpoints/.step-*", ".*.tmp", "units/.*")


def child(pipe: int, config: Path, changes: Sequence[str], out: Path, slow: bool) -> None:
    """Never returns. slow: what is written waits before it gets its name, so that a kill can fall into it."""
    for name in ("rename", "replace") if slow else ():
        setattr(os, name, partial(_later, getattr(os, name)))
    try:
        Trainer(load_config(config, changes), out, lambda line: say(pipe, line)).run()
    except BaseException as e:
        say(pipe, f"error: {e!r}")
        os._exit(1)
    os._exit(0)


def _later(call: Callable[..., None], *arguments: Any, **named: Any) -> None:
    time.sleep(0.05)
    call(*arguments, **named)


def say(pipe: int, line: str) -> None:
    os.write(pipe, line.encode() + b"\n")


def drafts(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for pattern in DRAFTS for p in out.glob(pattern))


class Run:
    """One process that trains, in a session of its own."""

    def __init__(self, config: Path, changes: Sequence[str], out: Path, slow: bool = False) -> None:
        self.out = out
        self.said = b""
        self.pipe, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            child(write_end, config, changes, out, slow)
        os.close(write_end)

    def lines(self) -> list[str]:
        return self.said.decode(errors="replace").splitlines()

    def listen(self, seconds: float) -> bool:
        """For so long at most, until it says something; False: it says nothing any more."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            return True
        found = os.read(self.pipe, 1 << 16)
        self.said += found
        return bool(found)

    def until(self, seconds: float = 0.0, lines: int = 0, writing: bool = False) -> None:
        """Returns when all of this has come to pass, or the process has ended."""
        began = time.perf_counter()
        while len(self.lines()) < lines and self.listen(1):
            pass
        if writing:
            while not drafts(self.out) and self.listen(0):
                pass
        while (left := began + seconds - time.perf_counter()) > 0 and self.listen(left):
            pass

    def end(self, kill: bool) -> int:
        """The status it ended with, after all that it said was read."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        else:
            while self.listen(600):
                pass
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.pipe)
        return status


def case(config: Path, out: Path, changes: Sequence[str], kills: int, rng: random.Random) -> dict:
    began = time.perf_counter()
    whole = Run(config, changes, out / "whole")
    if whole.end(kill=False):
        return {"error": whole.lines()[-1:], "killed": 0}
    took, steps = time.perf_counter() - began, len(whole.lines())
    said, left, killed = [], [], 0
    ways = rng.sample(["time", "lines", "writing"], 3)
    most = max(2, steps // (kills + 1))  # lines: all kills together come before the end
    while killed < kills:
        how = ways[killed % 3]
        run = Run(config, changes, out / "killed", slow=how == "writing")
        if how == "time":
            run.until(seconds=rng.uniform(0, took / (kills + 1)))
        elif how == "lines":
            run.until(lines=rng.randint(1, most))
            run.until(seconds=rng.uniform(0, 0.02))
        else:
            run.until(lines=rng.randint(1, most), writing=True)
            run.until(seconds=rng.choice([0, rng.uniform(0, 0.005)]))
        status = run.end(kill=True)
        said.append(run.lines())
        left.append(drafts(out / "killed"))
        if not os.WIFSIGNALED(status):
            break
        killed += 1
    last = Run(config, changes, out / "killed")
    status = last.end(kill=False)
    said.append(last.lines())
    return {"said": said, "left": left, "killed": killed, "status": status}


def main(config: str, out: str, cases: str) -> None:
    torch.set_num_threads(1)
    for name, changes, kills, seed in json.loads(cases):
        warm = [*changes, "optim.steps=1"]
        Trainer(load_config(Path(config), warm), Path(out) / name / "warm").run()  # what is loaded now, no child loads
        found = case(Path(config), Path(out) / name, changes, kills, random.Random(seed))
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
