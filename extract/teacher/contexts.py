"""Contexts as windows: which ids go through the model together, and whose states come out of them.

Invariant: windows depend on the plan and the settings alone, every token of every utterance comes out of exactly
one window, and a `past` window holds nothing later than what it is kept for.
Run: `pytest tests/extract/teacher/test_windows.py`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...data.errors import UsageError
from ..store.disk.layout import hash64


@dataclass(frozen=True)
class Context:
    """`alone`, `past:N`, `past:N+block`, `future:N` or `both:N`: at least N tokens unless the session ends."""

    name: str
    left: int
    right: int
    block: bool

    @property
    def size(self) -> int:
        return self.left + self.right


def parse_context(name: str) -> Context:
    """Errors: UsageError for a name that is none of the five."""
    if name == "alone":
        return Context(name, 0, 0, False)
    match = re.fullmatch(r"(past|future|both):([1-9]\d{0,5})(\+block)?", name)
    if match is None or (match[3] and match[1] != "past"):
        raise UsageError(f"unknown context {name!r}", expected="alone, past:N, past:N+block, future:N or both:N")
    n = int(match[2])
    return Context(name, n if match[1] != "future" else 0, n if match[1] != "past" else 0, bool(match[3]))


def check_context(context: Context, kind: str, room: int) -> None:
    """Errors: UsageError where a teacher of that kind, with `room` text tokens a pass, cannot give this context."""
    if kind == "decoder" and context.right:
        raise UsageError(f"a causal decoder cannot see ahead: {context.name}", expected="alone or past:N for a decoder")
    if kind == "decoder" and context.block:
        raise UsageError("a causal decoder needs no +block", expected=context.name.removesuffix("+block"))
    if context.size > room // 2:
        raise UsageError(
            f"{context.name} leaves too little of a window of {room} tokens",
            expected=f"N up to {room // 2}" if not (context.left and context.right) else f"N up to {room // 4}",
        )


@dataclass(frozen=True)
class Piece:
    """Tokens [first, last) of an utterance come out of a window at [at, at + last - first)."""

    utterance: int
    first: int
    last: int
    at: int


@dataclass
class Window:
    """One row of a batch. ids int32 [n], special tokens included; `blocks` int32 [n] where a token sees only its own
    block and earlier ones; `pieces` are what is kept.
    """

    ids: np.ndarray
    blocks: np.ndarray | None
    pieces: list[Piece]


@dataclass
class Passes:
    """All windows of a unit of work. input_hash uint64 [U], context_left/right int32 [U] for the unit's utterances."""

    windows: list[Window]
    input_hash: np.ndarray
    context_left: np.ndarray
    context_right: np.ndarray

    @property
    def tokens(self) -> int:
        return sum(len(w.ids) for w in self.windows)


@dataclass(frozen=True)
class Frame:
    """What surrounds the text: special ids, join ids, the longest pass, the aim for shared cores, and causality."""

    prefix: Sequence[int]
    suffix: Sequence[int]
    join: Sequence[int]
    window: int
    core: int
    causal: bool

    @property
    def room(self) -> int:
        return self.window - len(self.prefix) - len(self.suffix)


class Texts(Protocol):
    """Token ids of the utterances of a store; a slice gives a list of int32 arrays."""

    def __getitem__(self, which: slice) -> Sequence[np.ndarray]: ...


class Session:
    """Utterances in order as one run of ids with joins between. Positions are indices into `ids`."""

    def __init__(self, texts: Sequence[np.ndarray], join: Sequence[int]) -> None:
        parts: list[np.ndarray] = []
        text: list[np.ndarray] = []
        self.begin, self.end = np.zeros(len(texts), dtype=int), np.zeros(len(texts), dtype=int)
        at = 0
        glue = np.array(join, dtype=np.int32)
        for u, ids in enumerate(texts):
            if at and len(glue) and len(ids):
                parts.append(glue)
                text.append(np.zeros(len(glue), dtype=np.int64))
                at += len(glue)
            self.begin[u], self.end[u] = at, at + len(ids)
            parts.append(np.asarray(ids, dtype=np.int32))
            text.append(np.ones(len(ids), dtype=np.int64))
            at += len(ids)
        self.ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        # seen[p]: tokens of text (not of joins) before position p
        self.seen = np.concatenate([[0], np.cumsum(np.concatenate(text))]) if parts else np.zeros(1, np.int64)

    def left(self, position: int, n: int) -> int:
        """Latest position with n tokens of text between it and `position`, or the session's start."""
        if n == 0:
            return position
        aim = self.seen[position] - n
        return 0 if aim < 0 else int(np.searchsorted(self.seen, aim, side="right")) - 1

    def right(self, position: int, n: int) -> int:
        """Earliest position with n tokens of text between `position` and it, or the session's end."""
        if n == 0:
            return position
        return min(int(np.searchsorted(self.seen, self.seen[position] + n, side="left")), len(self.ids))


def build(context: Context, frame: Frame, session: Session, wanted: Set[int]) -> list[tuple[Window, int]]:
    """Windows that the utterances `wanted` of a session come out of; Piece.utterance counts the session's utterances.

    Returns (window, position of its first text token in the session) pairs. Who else is wanted changes no window.
    """
    out: list[tuple[Window, int]] = []
    for first, last in _groups(context, frame, session):
        if wanted.isdisjoint(range(first, last)):
            continue
        begin = session.left(int(session.begin[first]), context.left)
        end = session.right(int(session.end[last - 1]), context.right)
        for window, a in _cut(context, frame, session, first, last, begin, end):
            window.pieces = [p for p in window.pieces if p.utterance in wanted]
            if window.pieces:
                out.append((window, a))
    return out


def _groups(context: Context, frame: Frame, session: Session) -> list[tuple[int, int]]:
    """Runs [first, last) of utterances that share a window; utterances without tokens are in none.

    Cut from the session's beginning, so that a session alone decides, not the shards that it lies in.
    """
    full = np.flatnonzero(session.end > session.begin).tolist()
    shared = context.size > 0 and (context.block or frame.causal or (context.left > 0 and context.right > 0))
    if not shared:
        return [(u, u + 1) for u in full]
    most = max(1, min(frame.core, frame.room - context.size))
    groups: list[tuple[int, int]] = []
    for u in full:
        if groups and session.end[u] - session.begin[groups[-1][0]] <= most:
            groups[-1] = (groups[-1][0], u + 1)
        else:
            groups.append((u, u + 1))
    return groups


def _cut(
    context: Context, frame: Frame, session: Session, first: int, last: int, begin: int, end: int
) -> list[tuple[Window, int]]:
    """The pass over session positions [begin, end), in several overlapping windows where it is too long for one."""
    suffix = () if context.block else frame.suffix  # a suffix would tell a block how much comes after it
    room = frame.window - len(frame.prefix) - len(suffix)
    total = end - begin
    if total <= room:
        starts = [begin]
    else:
        count = 1 + -(-(total - room) // (room - room // 2))
        starts = [begin + round(i * (total - room) / (count - 1)) for i in range(count)]
    spans = [(s, min(s + room, end)) for s in starts]
    owner = _owners(spans, begin, end, frame.causal)
    windows: list[tuple[Window, int]] = []
    for k, (a, b) in enumerate(spans):
        pieces = []
        for u in range(first, last):
            mine = np.flatnonzero(owner[session.begin[u] - begin : session.end[u] - begin] == k)
            if len(mine):
                t0, t1 = int(mine[0]), int(mine[-1]) + 1
                pieces.append(Piece(u, t0, t1, int(session.begin[u]) + t0 - a + len(frame.prefix)))
        if not pieces:
            continue
        ids = np.concatenate([frame.prefix, session.ids[a:b], suffix]).astype(np.int32)
        blocks = None
        if context.block:
            # Block 0: prefix and left context; then one a utterance, the join before it included.
            edges = np.array([session.end[u] for u in range(first, last)])
            inner = 1 + np.searchsorted(edges, np.arange(a, b), side="right")
            inner[np.arange(a, b) < session.begin[first]] = 0
            blocks = np.concatenate([np.zeros(len(frame.prefix)), inner]).astype(np.int32)
        windows.append((Window(ids, blocks, pieces), a))
    return windows


def _owners(spans: list[tuple[int, int]], begin: int, end: int, causal: bool) -> np.ndarray:
    """Which window each position of [begin, end) is taken from: the one where the nearer cut is farthest.

    An end of the text is no cut; a causal model has no right cut.
    """
    if len(spans) == 1:
        return np.zeros(end - begin, dtype=int)
    positions = np.arange(begin, end)
    scores = np.full((len(spans), end - begin), -1.0)
    for k, (a, b) in enumerate(spans):
        inside = (positions >= a) & (positions < b)
        left = np.inf if a == begin else positions - a
        right = np.inf if b == end or causal else b - 1 - positions
        scores[k, inside] = np.broadcast_to(np.minimum(left, right), positions.shape)[inside]
    return np.argmax(scores, axis=0)


def passes(
    context: Context, frame: Frame, texts: Texts, sessions: np.ndarray, wanted: Sequence[int] | np.ndarray
) -> Passes:
    """Windows of some utterances of a corpus: `wanted` are their positions, -1 for one that is not to be run.

    `texts` and `sessions` are of the whole corpus, in its order. Neighbours that are not wanted serve as context.
    Windows with the same ids and blocks are run once. Pieces and results count `wanted`.
    """
    count = len(wanted)
    result = Passes([], np.zeros(count, np.uint64), np.zeros(count, np.int32), np.zeros(count, np.int32))
    fed: list[list[bytes]] = [[] for _ in range(count)]
    known: dict[bytes, Window] = {}
    number = {int(p): i for i, p in enumerate(wanted) if p >= 0}
    rest = sorted(number)
    at = 0
    while at < len(rest):
        begin, end = bounds(sessions, rest[at])
        stop = bisect_left(rest, end, at)
        session = Session(texts[begin:end], frame.join)
        seen: set[int] = set()
        for window, a in build(context, frame, session, {p - begin for p in rest[at:stop]}):
            pieces = [Piece(number[p.utterance + begin], p.first, p.last, p.at) for p in window.pieces]
            b = a + len(window.ids) - len(frame.prefix) - (0 if context.block else len(frame.suffix))
            for p, local in zip(pieces, window.pieces):
                n = p.at + p.last - p.first if frame.causal or context.block else len(window.ids)
                blocks = b"" if window.blocks is None else window.blocks[:n].tobytes()
                head = f"{p.first} {p.last} {p.at} {n}".encode()
                fed[p.utterance].append(head + b"\0" + window.ids[:n].tobytes() + blocks)
                text_begin, text_end = session.begin[local.utterance], session.end[local.utterance]
                if p.utterance not in seen:
                    seen.add(p.utterance)
                    result.context_left[p.utterance] = session.seen[text_begin] - session.seen[min(a, text_begin)]
                hidden = frame.causal or context.block  # what follows is in the window, but cannot be seen
                right = 0 if hidden else session.seen[max(b, text_end)] - session.seen[text_end]
                result.context_right[p.utterance] = right
            key = window.ids.tobytes() + (b"" if window.blocks is None else b"|" + window.blocks.tobytes())
            if key in known:
                known[key].pieces.extend(pieces)
            else:
                known[key] = window
                window.pieces = pieces
                result.windows.append(window)
        at = stop
    result.input_hash[:] = [hash64(b"\1".join(parts)) for parts in fed]
    return result


def bounds(sessions: np.ndarray, u: int) -> tuple[int, int]:
    """The run [begin, end) of utterances of u's session; sessions are contiguous in the order of a corpus."""
    begin = end = u
    while begin > 0 and sessions[begin - 1] == sessions[u]:
        begin -= 1
    while end < len(sessions) and sessions[end] == sessions[u]:
        end += 1
    return begin, end
