"""Stores with hostile contents: changed metadata, flipped bytes, and pipes or loops in place of files.

Every command that reads a store ends with data or an error of ours, soon and in little memory; what writes leaves
nothing half written. test_odd_stores.py has the stores that are strange but sound, and files damaged one by one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
from hostile import WRONG, dumped, places, put, run, spoilt

from stillhouse.extract.store import Store

slow = pytest.mark.slow
# Numbers whose squares overflow, in norms or in states that bear no checksum here
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def commands(root: Path, out: Path) -> list[list[object]]:
    pair = "known/alone/2,known/both:8/4"
    return [
        ["inspect", "info", root, "--json"],
        ["inspect", "ls", root, "--utterances"],
        ["inspect", "show", root, "s00-0001", "--values"],
        ["inspect", "stats", root, "--tokens", 20],
        ["inspect", "tree", root],
        ["inspect", "verify", root, "--data"],
        ["inspect", "export", root, out / "x.npz"],
        ["inspect", "neighbours", root, "s00-0001:0", "--view", "known/alone/2"],
        ["inspect", "compare", root, "s00-0001", "--views", pair],
        ["inspect", "similarity", root, "--tokens", 20],
        ["inspect", "diff", root, root],
        ["inspect", "ls", root],
        ["store", "cp", root, out / "copy.zarr", "--views", "known/alone/2"],
        ["store", "rm", root, "known/alone/4", "--dry-run"],
        ["extract", root.parent / "corpus.jsonl", root, "--status"],
    ]


@pytest.fixture(scope="module", params=["float16", "int8"])
def root(known, tmp_path_factory, request) -> Path:
    return known.build(tmp_path_factory.mktemp("hostile"), dtype=request.param).path


def files(root: Path) -> list[Path]:
    """Return one file of each kind. Paths that differ only in numbers are of one kind."""
    found: dict[tuple, Path] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        parts = path.relative_to(root).parts
        if parts[0] not in ("locks", "tmp"):
            found.setdefault(tuple("".join(c for c in p if not c.isdigit()) for p in parts), path)
    return list(found.values())


@contextmanager
def instead(path: Path, how: object) -> Iterator[None]:
    """Replace `path` by other bytes, or by something that is not a file."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    links = {"loop": path.name, "nowhere": "nowhere", "endless": "/dev/zero", "nothing": "/dev/null"}
    if isinstance(how, bytes):
        path.write_bytes(how)
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "huge":
        with path.open("wb") as f:
            f.truncate(1 << 40)
    else:
        path.symlink_to(links[str(how)])
    try:
        yield
    finally:
        path.rmdir() if how == "folder" else path.unlink()
        aside.rename(path)


def tried(root: Path, out: Path, number: int, count: int) -> None:
    """Run `count` of the commands, chosen by number. A command that fails leaves nothing in `out`."""
    every = commands(root, out)
    for k in range(count):
        result = run(*every[(number + k * 7) % len(every)])
        if result.exit_code:
            assert list(out.iterdir()) == [] and str(result.exception)
        for left in out.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def changes(root: Path, seed: int) -> Iterator[tuple[Path, bytes]]:
    """Yield JSON files in which one part is replaced or removed, in an order that depends on a seed."""
    cases = []
    for path in files(root):
        if path.suffix == ".json":
            value = json.loads(path.read_bytes())
            for place in [(), *places(value)]:
                cases += [(path, value, place, new, False) for new in WRONG]
                cases += [(path, value, place, None, True)] if place else []
    random.Random(seed).shuffle(cases)
    for path, value, place, new, drop in cases:
        yield path, dumped(put(value, place, new, drop))


@pytest.mark.parametrize("cases", [120, pytest.param(4_000, marks=slow)])
def test_metadata_with_other_values(root: Path, tmp_path: Path, cases: int) -> None:
    for number, (path, data) in enumerate(islice(changes(root, seed=cases), cases)):
        with instead(path, data):
            tried(root, tmp_path, number, 1)


@pytest.mark.parametrize("rounds", [1, pytest.param(60, marks=slow)])
def test_bytes_turned_over(root: Path, tmp_path: Path, rounds: int) -> None:
    rng = random.Random(rounds)
    for number, path in enumerate(files(root) * rounds):
        with instead(path, spoilt(path.read_bytes(), rng)):
            tried(root, tmp_path, number, 1)


ODD = ("folder", "loop", "nowhere", "pipe", "endless", "nothing", "huge")


@pytest.mark.parametrize("how", ODD)
def test_what_is_no_file(root: Path, tmp_path: Path, how: str) -> None:
    for number, path in enumerate(files(root)):
        if number % 3 == ODD.index(how) % 3:
            with instead(path, how):
                tried(root, tmp_path, number, 1)


@slow
@pytest.mark.parametrize("how", ODD)
def test_every_file_that_is_none(root: Path, tmp_path: Path, how: str) -> None:
    for path in files(root):
        with instead(path, how):
            tried(root, tmp_path, 0, len(commands(root, tmp_path)))


def test_folders_that_lead_back_or_are_none(root: Path, tmp_path: Path) -> None:
    folders = sorted(p for p in root.rglob("*") if p.is_dir() and "c" not in p.parts[:-1])
    for number, folder in enumerate(folders):
        with instead(folder, ("loop", b"x", "nowhere")[number % 3]):
            tried(root, tmp_path, number, 1)


def test_a_plan_that_leads_out_of_the_store(root: Path, tmp_path: Path) -> None:
    """A name in a plan never leads to a path outside of the store."""
    head = json.loads((root / "store.json").read_bytes())
    away = json.loads(json.dumps(head).replace('"alone"', '"../../../etc"').replace('"known"', '"../known"'))
    with instead(root / "store.json", dumped(away)):
        for command in commands(root, tmp_path):
            assert run(*command).exit_code in (1, 2, 10)


@pytest.mark.parametrize("name", ["utterances/text_hash", "known/crc32c", "known/token_id"])
def test_declared_sizes_are_not_believed(store: Store, name: str) -> None:
    """A process with 6 GiB stops at once, with an error message, if an array declares 10^13 numbers."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
    code += "from stillhouse.cli import main; main()"
    path = store.path / "data.zarr" / name / "zarr.json"
    meta = json.loads(path.read_bytes())
    meta["shape"][-1] = 10**13
    command = [sys.executable, "-c", code, "inspect", "verify", str(store.path)]
    with instead(path, dumped(meta)):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told = done.stdout + done.stderr
    assert done.returncode == 1 and "unexpected error" not in told and "Traceback" not in told, told
    assert str(store.path) in told or name.split("/")[1] in told


def test_the_store_is_as_it_was(root: Path) -> None:
    """This test runs last. If a file was not restored, the tests above did not test what they describe."""
    assert Store.open(root, checksums=True).gather(["s00-0001"], Store.open(root).views)
    assert run("inspect", "verify", root, "--data").exit_code == 0
