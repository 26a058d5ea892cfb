"""Run writers on one store, and ask for its status meanwhile. test_status.py runs it as a process.

Usage: python status_child.py CORPUS STORE TEACHER CONTEXTS WRITERS KILL
Writers are forked children that stop themselves when they begin a work item. The parent asks for the status and
continues them, but kills the KILL-th one that stops. Prints one JSON line for each status: the event, the process and
the status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from crashes import fork_attempt

from stillhouse.data.manifest import read_manifest
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.teacher.model import load_teacher

LAYERS = [0, 2]


def main() -> None:
    corpus_path, root, source, contexts, writers, kill = sys.argv[1:]
    torch.set_num_threads(1)
    corpus, teacher = read_manifest(corpus_path), load_teacher(source, device="cpu")
    request = Request("t", LAYERS, contexts.split(","))
    alive, stops = set(), 0
    for _ in range(int(writers)):
        alive.add(fork_attempt(lambda: extract(Path(root), corpus, teacher, request), "allocated", signal.SIGSTOP))
    while alive:
        pid, how = os.waitpid(-1, os.WUNTRACED)
        stopped = os.WIFSTOPPED(how)
        stops += stopped
        what = "stopped" if stopped else "killed" if os.WIFSIGNALED(how) else f"ended {os.WEXITSTATUS(how)}"
        print(json.dumps({"what": what, "pid": pid, **status(Path(root)).as_json()}), flush=True)
        if not stopped:
            alive.remove(pid)
        elif stops == int(kill):
            os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGCONT)


if __name__ == "__main__":
    main()
