"""How fast a look is: `info` and `show` in a fresh process on a store of 30,000 utterances, each under a second."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from stillhouse.extract.inspect import neighbours
from stillhouse.extract.store import View


@pytest.fixture(scope="module")
def big(known, tmp_path_factory):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in rng.integers(0, 20_000, rng.integers(2, 40))) for _ in range(30_000)]
    return known.build(tmp_path_factory.mktemp("big"), texts, contexts=("alone",), per_session=50)


@pytest.mark.bench
@pytest.mark.parametrize("command", [["info"], ["show", "ID"], ["ls"], ["ls", "--utterances", "s50-*"]])
def test_a_look_takes_less_than_a_second(big, command):
    rest = [big.utterance_ids[100] if c == "ID" else c for c in command[1:]]
    program = [sys.executable, "-m", "stillhouse.cli", "inspect", command[0], str(big.path), *rest]
    best = 9.0
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(program, capture_output=True, text=True, check=False)
        best = min(best, time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
    print(f"stillhouse inspect {command[0]}: {best:.2f} s")
    assert best < 1.0


@pytest.mark.bench
def test_neighbours_among_all_tokens(big):
    utterance = big.utterance_ids[5]
    began = time.perf_counter()
    found = neighbours.nearest(big, View("known", "alone", 4), utterance, "0")
    took = time.perf_counter() - began
    print(f"nearest of {found.searched:,} tokens of width 12 in {took:.2f} s")
    assert took < 5
