"""How long `stillhouse inspect` takes and how much memory: every command in a process of its own, on two stores.

1. 30,000 utterances of LibriSpeech's lengths, four views 384 wide, every row written: 3.5 GB.
2. The same utterances, 12 views 4,096 wide: 112 GB by its files, whose first shards have rows and whose others are
   holes (they read as zeros, at the speed of memory): whatever grows with the store and not with what is shown, shows.

Usage: make bench-inspect, or python tests/bench/bench_inspect.py --utterances 3000 --rounds 1 --out /tmp/table.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from made_up import MadeUpTeacher, made_up_corpus
from measuring import Row, at_most, write_table

from stillhouse.extract.pipeline.extract import make_plan
from stillhouse.extract.pipeline.norms import write_norms
from stillhouse.extract.pipeline.progress import ExtractionProgress
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.pipeline.runner import ItemRunner, LockedItem
from stillhouse.extract.store import Store, writer
from stillhouse.extract.store.disk.locks import Scratch
from stillhouse.extract.store.read.rows import TeacherRows
from stillhouse.extract.store.writer import ItemWriter

LOOK_S, LOOK_BYTES = 1.0, 200 << 20  # of what is told without states
# Of what reads a sample of them, a shard or a whole view
REST_S, REST_BYTES = 10.0, 1 << 30
VIEW_S = 60.0


def build(folder: Path, utterances: int, width: int, layers: int, holes: bool) -> Store:
    """A store of one teacher, `alone`; with `holes`, only each layer's first shard has its rows on the disk."""
    teacher = MadeUpTeacher(width, layers)
    request = Request("made-up", tuple(range(layers)), ("alone",))
    plan = make_plan(folder, made_up_corpus(utterances), teacher, request)  # type: ignore[arg-type]
    sparse = mock.patch.object(writer, "allocate", os.ftruncate)
    with Scratch(plan.paths) as scratch, sparse:
        rows = TeacherRows(plan, "made-up")
        with ItemRunner(plan, teacher, rows, scratch.folder, ExtractionProgress()) as runner:  # type: ignore[arg-type]
            for unit in plan.work_items("made-up"):
                if unit.shard.number == 0 or not holes:
                    runner.run_items([LockedItem(unit)])
                else:
                    _commit_holes(plan, rows, unit, scratch.folder, runner.index)
        write_norms(plan, "made-up", "alone", scratch.folder)
    return Store.open(folder)


def _commit_holes(plan, rows, unit, scratch, index) -> None:
    first, last = unit.shard.first, unit.shard.last
    ids = [index.id(u) for u in range(first, last)]
    record = plan.teachers["made-up"]
    with ItemWriter(plan.paths, scratch, record, unit, rows.start[first:last], rows.length[first:last], ids) as out:
        for layer in unit.layers:
            out.written[layer][:] = True
        seen = np.zeros(last - first, np.int32)
        out.commit(seen.astype(np.uint64), seen, seen, unit.generation.number)


# A child's largest resident size begins at its parent's, so a small process starts what is measured. The pages of the
# store that it has mapped are the kernel's to take back, so what it has for itself is looked at, 100 times a second.
LAUNCH = """
import json, os, sys, time
began = time.perf_counter()
null = os.open(os.devnull, os.O_WRONLY)
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
own, done = 0, 0
while not done:
    try:
        with open(f"/proc/{pid}/status") as f:
            own = max([own, *(int(line.split()[1]) for line in f if line.startswith(("RssAnon", "RssShmem")))])
    except OSError:
        pass
    time.sleep(0.01)
    done, status, used = os.wait4(pid, os.WNOHANG)
took = time.perf_counter() - began
unit = 1 if sys.platform == "darwin" else 1024
peak = used.ru_maxrss * unit
said = [os.waitstatus_to_exitcode(status), took, used.ru_utime + used.ru_stime, own * 1024 or peak, peak]
print(json.dumps(said))
"""


def measure(arguments: list[str], rounds: int) -> tuple[float, float, int, int]:
    """(shortest wall time, its CPU time in s, most bytes of its own, most resident) of a command in a fresh process."""
    command = [sys.executable, "-c", LAUNCH, sys.executable, "-m", "stillhouse.cli", "inspect", *arguments]
    found = []
    for _ in range(rounds):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        code, *measured = json.loads(done.stdout)
        if code not in (0, 1):
            raise SystemExit(f"stillhouse inspect {' '.join(arguments)} ended with {code}")
        found.append(measured)
    took, cpu, *_ = min(found)
    return took, cpu, max(own for _, _, own, _ in found), max(peak for *_, peak in found)


def commands(store: Store, folder: Path) -> list[tuple[list[str], float, int]]:
    """(arguments, bar in seconds, bar in bytes): looks, samples, and what reads a whole view."""
    path, utterance = str(store.path), store.utterance_ids[100]
    last = store.views[-1].address
    two = f"{store.views[0].address},{last}"
    look = [["info"], ["ls"], ["ls", "--utterances", "spk50-*"], ["show", utterance], ["tree"], ["info", "--json"]]
    look += [["compare", utterance, "--views", two], ["verify"]]
    sample = [["stats"], ["similarity"], ["diff", path], ["verify", "--sample", "0.1%"]]
    sample += [["export", str(folder / "out.npz"), "spk50-*", "--view", last, "--force"]]
    sample += [["plot", str(folder / "norms.png"), "--kind", "norms", "--force"]]
    whole = [["neighbours", f"{utterance}:3", "--view", last], ["report", str(folder / "out.html"), "--force"]]
    timed = [(c, LOOK_S, LOOK_BYTES) for c in look] + [(c, REST_S, REST_BYTES) for c in sample]
    timed += [(c, VIEW_S, REST_BYTES) for c in whole]
    return [([c[0], path, *c[1:]], seconds, most) for c, seconds, most in timed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--utterances", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on a disk with room for 6 GB")
    parser.add_argument("--out", type=Path, default=Path("docs/bench/inspect.md"))
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        for name, width, layers, holes in (("small", 384, 4, False), ("large", 4096, 12, True)):
            store = build(folder / f"{name}.zarr", options.utterances, width, layers, holes)
            size = sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file())
            for arguments, seconds, most in commands(store, folder):
                took, cpu, own, peak = measure(arguments, options.rounds)
                shown = " ".join([arguments[0], *(a for a in arguments[2:] if not a.startswith(str(folder)))])
                what = f"{size / 1e9:,.1f} GB: `{shown}`"
                rows.append(at_most(f"{what}, s", took, seconds, f"{cpu:.2f} s of CPU"))
                mapped = f"{peak / 1e6:,.0f} resident, with the store's pages"
                rows.append(at_most(f"{what}, MB", own / 1e6, most / 1e6, mapped))
                print(rows[-2].cells(), rows[-1].cells(), sep="\n", flush=True)
    remarks = [
        f"Each command runs in a fresh process. Rows show the best of {options.rounds}. Memory is what the process has "
        "for itself, without the mapped pages of the store, which the kernel can take back. The stores have "
        f"{options.utterances:,} utterances. After the first shard of each layer, the files of the larger store are "
        "holes, so that reading them costs no disk."
    ]
    write_table(options.out, "Looking into stores: bars", "make bench-inspect", rows, remarks)


if __name__ == "__main__":
    main()
