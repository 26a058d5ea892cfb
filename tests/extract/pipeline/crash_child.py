"""Extract again and again, each time killed with SIGKILL at a named crash point. test_crash.py runs it as a process.

Usage: python crash_child.py CORPUS STORE TEACHER CONTEXTS [CRASH_POINT:N …]
Each attempt is a forked child, so that torch is imported once. The last attempt has no kill. Prints one JSON line
an attempt: the signal that ended it, and what a reader sees afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from crashes import end_of, fork_attempt

from stillhouse.data.errors import NoStoreError
from stillhouse.data.manifest import read_manifest
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.speech.teacher import load_any_teacher
from stillhouse.extract.store import Store

LAYERS = [0, 2]


def seen(root: Path) -> dict:
    """Return what a new reader can read: rows of committed (view, utterance) pairs, compared with their checksums."""
    try:
        store = Store.open(root, checksums=True)
    except NoStoreError:
        return {"planned": False, "rows": 0, "units": 0}
    rows = items = 0
    for view in store.planned_views:
        have = store.has(store.utterance_ids, view)
        ids = [i for i, h in zip(store.utterance_ids, have) if h]
        rows += len(store.gather(ids, [view]).states[view])
        items += sum(
            1 for shard, k in store.commits(view.teacher, view.context).of if k == view.layer and shard != "norms"
        )
    return {"planned": True, "rows": rows, "units": items, "views": len(store.views)}


def seen_by_another_process(root: Path) -> dict:
    """Return `seen` of a child: a process that has read an object store must not fork the next attempt."""
    end, other_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(other_end, json.dumps(seen(root)).encode())
        os._exit(0)
    os.close(other_end)
    with os.fdopen(end) as answer:
        found = json.loads(answer.read())
    os.waitpid(child, 0)
    return found


def main() -> None:
    corpus_path, root, source, contexts, *phases = sys.argv[1:]
    corpus = read_manifest(corpus_path)
    teacher = load_any_teacher(source, device="cpu", corpus=Path(corpus_path))
    dtype = os.environ.get("STILLHOUSE_TEST_DTYPE", "float16")
    request = Request("t", LAYERS, contexts.split(","), dtype=dtype)
    for where in [*phases, ""]:
        end = end_of(fork_attempt(lambda: extract(Path(root), corpus, teacher, request), where))
        print(json.dumps({"phase": where, **end, **seen_by_another_process(Path(root))}))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
