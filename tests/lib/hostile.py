"""What tests of hostile input share: how to wreck bytes and JSON, and a run of a command that may neither fail oddly,
wait, nor fill the memory.

Invariant: the same seed wrecks alike, so a failure can be looked at again. Used by tests/*/test_hostile*.py.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from hypothesis import strategies as st

from stillhouse.cli import cli
from stillhouse.data.errors import StillhouseError

# What a careless edit leaves, and what a careful enemy writes.
SPLINTERS = [
    b"", b"\n", b"\t", b" ", b"\0", b"\xff", b"\xef\xbb\xbf", b"|", b"-1", b"nan", b"1e999", b"9" * 5000, b"[" * 3000,
    b'"', b"\\ud800", b"null", b"{}", b"../", b"/dev/zero", b"/dev/stdin", b"\xe2\x80\xa8", b"a.wav:7",
]  # fmt: skip
# Of every type of JSON, too large, too small, and what leads elsewhere
WRONG: list[Any] = [None, True, -1, 0, 3, 10**12, 10**30, 0.5, 1e308, float("nan"), "", "x", "../..", "\ud800", [], [0],
                    [[1]], ["x"], [10**12], [-1], {}, {"x": 1}]  # fmt: skip
SECONDS, BYTES = 20, 2 << 30


def wrecked(data: bytes) -> st.SearchStrategy[bytes]:
    """The data with some stretches replaced, repeated or cut away."""

    def wreck(hits: list[tuple[float, int, bytes]]) -> bytes:
        out = data
        for place, length, splinter in hits:
            at = int(place * len(out))
            out = out[:at] + splinter + out[at + length :]
        return out

    splinter = st.one_of(st.sampled_from(SPLINTERS), st.binary(max_size=6))
    return st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), splinter), min_size=1, max_size=4).map(wreck)


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """The same by a seed, for bytes that no one reads as text: flipped, cut, longer, other bytes inside."""
    out = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(out[: rng.randrange(len(out) + 1)])
    if kind == 1:
        return bytes(out) + rng.randbytes(rng.choice([1, 8, 4096]))
    if kind == 2:
        return rng.randbytes(len(out))
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(max(1, len(out)))
        out[at : at + rng.choice([1, 1, 4, 8])] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(4), b"\x7f"])
    return bytes(out)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def replaced(value: Any) -> st.SearchStrategy[Any]:
    """The JSON value with one of its parts, at any depth, replaced by anything or gone."""
    drawn = st.tuples(st.sampled_from(list(places(value))), JSON, st.booleans())
    return drawn.map(lambda choice: put(value, choice[0], choice[1], drop=choice[2]))


def put(value: Any, place: tuple, new: Any, drop: bool = False) -> Any:
    """A copy of the JSON value in which the part at `place` is another, or gone."""
    if not place:
        return new
    out = inside = copy.deepcopy(value)
    for key in place[:-1]:
        inside = inside[key]
    if drop:
        del inside[place[-1]]
    else:
        inside[place[-1]] = new
    return out


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path of every part of a JSON value, itself excepted."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


class Stuck(BaseException):
    """Not an Exception, so that no one catches it by chance."""


@contextmanager
def limited(seconds: int = SECONDS, memory: int = BYTES) -> Iterator[None]:
    """Neither longer than so, nor more memory than what the process has now and that much."""

    def stuck(*_: object) -> None:
        raise Stuck(f"more than {seconds} s")

    before, limits = signal.signal(signal.SIGALRM, stuck), resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def run(*words: object) -> Any:
    """The command's result; whatever it raises must be ours, or click's."""
    with limited():
        result = CliRunner().invoke(cli, [str(w) for w in words])
    if not isinstance(result.exception, SystemExit | StillhouseError | None):
        raise AssertionError(f"{words}: {result.exception!r}") from result.exception
    return result


def dumped(value: Any) -> bytes:
    """JSON of anything, half a surrogate and NaN included."""
    return json.dumps(value).encode()
