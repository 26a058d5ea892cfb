"""Change a store again and again, and kill the process each time. test_kills.py runs it as a process.

Usage: python kill_child.py ACTION STORE TEACHER CORPUS OUT [CRASH_POINT:N …]
ACTION is refresh, gc, remove or merge. Each attempt is a forked child; the last has no kill. Prints one JSON line an
attempt: the signal that ended it, and a digest of what a fresh reader finds, utterance by utterance.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from crashes import end_of, fork_attempt

from stillhouse.data.manifest import read_manifest
from stillhouse.extract.maintain import combine, gc, remove
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.teacher.model import load_teacher

LAYERS, CONTEXTS = [0, 2], ["alone", "both:4"]


def seen(root: Path) -> dict:
    """Return {view: {utterance: digest}} of all that can be read; {} without a store. Checksums are compared."""
    if not (root / "store.json").exists():
        return {}
    store = Store.open(root, checksums=True)
    found: dict[str, dict[str, str]] = {}
    for view in store.planned_views:
        have = store.has(store.utterance_ids, view)
        ids = [i for i, h in zip(store.utterance_ids, have) if h]
        found[view.address] = {
            i: hashlib.blake2b(store.gather([i], [view]).states[view].tobytes(), digest_size=6).hexdigest() for i in ids
        }
    return found


def main() -> None:
    action, root, source, corpus, out, *phases = sys.argv[1:]
    torch.set_num_threads(1)
    teacher = load_teacher(source, device="cpu") if action == "refresh" else None
    now = read_manifest(corpus)
    run: Callable[[], object]
    if action == "refresh":
        request = Request("t", LAYERS, CONTEXTS)
        run = lambda: extract(Path(root), now, teacher, request, refresh=True)  # type: ignore[arg-type]  # noqa: E731
    elif action == "gc":
        run = lambda: gc.collect_garbage(Path(root))  # noqa: E731
    elif action == "remove":
        run = lambda: remove.remove_views(Path(root), ["t/both:4/2"])  # noqa: E731
    else:
        run = lambda: combine.merge(Path(root), Path(root).with_name("other"), Path(out))  # noqa: E731
    watched = Path(out if action == "merge" else root)
    for where in [*phases, ""]:
        print(json.dumps({"phase": where, **end_of(fork_attempt(run, where)), "seen": seen(watched)}))
        sys.stdout.flush()
        if action == "merge" and where and watched.exists():
            shutil.rmtree(watched)


if __name__ == "__main__":
    main()
