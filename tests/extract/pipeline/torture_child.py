"""Run three writers on one store, and kill them again and again. test_torture.py runs it as a process.

Usage: python torture_child.py CORPUS STORE TEACHER CONTEXTS KILLS SEED
Writers are forked children that get SIGKILL at a random call of a random crash point. Killed ones are replaced until
KILLS have died. Then three run to their end. Prints one JSON line: kills by crash point, and what a reader saw after
each kill.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from stillhouse.data.manifest import read_manifest
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.speech.teacher import load_any_teacher

sys.path.insert(0, str(Path(__file__).parent))
from crash_child import LAYERS, seen
from crashes import fork_attempt

# Crash points, and the latest call at which a writer is killed. It is in the first work item, so that work is left.
MOMENTS = {
    "planned": 1,
    "allocated": 1,
    "mid_write": 60,
    "before_rename": 1,
    "mid_rename": 2,
    "renamed": 1,
    "before_link": 1,
    "after_link": 1,
}


def main() -> None:
    corpus_path, root, source, contexts, kills, seed = sys.argv[1:]
    corpus, teacher = read_manifest(corpus_path), load_any_teacher(source, device="cpu", corpus=Path(corpus_path))
    dtype = os.environ.get("STILLHOUSE_TEST_DTYPE", "float16")
    request, dice = Request("t", LAYERS, contexts.split(","), dtype=dtype), random.Random(int(seed))
    alive: dict[int, str] = {}

    def start(where: str) -> None:
        alive[fork_attempt(lambda: extract(Path(root), corpus, teacher, request), where)] = where

    def moment() -> str:
        planned = (Path(root) / "store.json").exists()  # a planned store is never planned again
        phase = dice.choice([p for p in MOMENTS if p != "planned"] if planned else list(MOMENTS))
        return f"{phase}:{dice.randint(1, MOMENTS[phase])}"

    died: Counter[str] = Counter()
    rows: list[int] = []
    failed = 0
    while sum(died.values()) < int(kills):
        while len(alive) < 3:
            start(moment())
        child, status = os.wait()
        where = alive.pop(child)
        if os.WIFSIGNALED(status):
            died[where.split(":")[0]] += 1
            rows.append(seen(Path(root))["rows"])
        elif os.WEXITSTATUS(status):
            failed += 1
        else:
            break  # the store is complete before all have died: the caller asked for too many kills
    while len(alive) < 3:
        start("")
    while alive:
        child, status = os.wait()
        died_here = alive.pop(child)
        if os.WIFSIGNALED(status):
            died[died_here.split(":")[0]] += 1
            start("")
        else:
            failed += bool(os.WEXITSTATUS(status))
    print(json.dumps({"died": died, "history": rows, "failed": failed, **seen(Path(root))}))


if __name__ == "__main__":
    main()
