"""Contexts as windows: which token ids go through the model together, and which states are kept of them.

Guarantees: windows depend on the plan and the settings alone. Every token of every utterance is kept from exactly one
window. A `past` window holds nothing later than what it is kept for.
Try: `pytest tests/extract/teacher/test_windows.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from ...data.errors import UsageError
from ..store.disk.layout import hash64
from ..store.views import Context


def check_context(context: Context, kind: str, text_limit: int) -> None:
    """Raise UsageError where an "encoder" or "decoder" cannot give a context in windows of `text_limit` text tokens."""
    if kind == "decoder" and context.right:
        raise UsageError(f"a causal decoder cannot see what follows: {context.name}", expected="alone or past:N")
    if kind == "decoder" and context.block:
        raise UsageError("a causal decoder needs no +block", expected=context.name.removesuffix("+block"))
    if context.size > text_limit // 2:
        most = f"N up to {text_limit // (4 if context.left and context.right else 2)}"
        raise UsageError(f"{context.name} leaves too little of a window of {text_limit} tokens", expected=most)


@dataclass(frozen=True)
class KeptTokens:
    """Tokens [first, last) of an utterance, whose states are kept from a window's places [at, at + last - first)."""

    utterance: int
    first: int
    last: int
    at: int


@dataclass
class Window:
    """One row of a batch."""

    ids: np.ndarray  # int32 [n], special tokens included
    blocks: np.ndarray | None  # int32 [n]: a token sees its own block and earlier ones; None: what the model allows
    kept: list[KeptTokens]

    @property
    def size(self) -> int:
        """What it costs the model, in tokens."""
        return len(self.ids)


@dataclass
class ItemWindows:
    """All windows of a work item of U utterances: input_hash uint64 [U], context_left and context_right int32 [U].

    The hash of audio is 0 until the model has read it.
    """

    windows: list[Any]  # each a Window, or a SoundWindow of a speech teacher
    input_hash: np.ndarray
    context_left: np.ndarray
    context_right: np.ndarray

    @property
    def size(self) -> int:
        """What all of them cost the model, in tokens or frames."""
        return sum(w.size for w in self.windows)


@dataclass(frozen=True)
class WindowFormat:
    """What a teacher puts around the text, and how long its windows are."""

    prefix: Sequence[int]  # special token ids before the text
    suffix: Sequence[int]
    join: Sequence[int]  # ids between two utterances
    window: int  # most tokens of a window
    core: int  # text tokens that the utterances of a shared window should have together
    causal: bool  # no token sees a later one

    @property
    def text_limit(self) -> int:
        """Text tokens that fit into one window."""
        return self.window - len(self.prefix) - len(self.suffix)


class TokenLists(Protocol):
    """Token ids of the utterances of a store; a slice gives a list of int32 arrays."""

    def __getitem__(self, which: slice) -> Sequence[np.ndarray]: ...


class SessionTokens:
    """The utterances of a session as one run of ids with joins between. Positions are indices into `ids`."""

    def __init__(self, texts: Sequence[np.ndarray], join: Sequence[int]) -> None:
        length = np.array([len(ids) for ids in texts], dtype=np.int64)
        after_text = np.cumsum(length) > length  # whether text precedes the utterance
        joined = (length > 0) & after_text
        self.end = np.cumsum(length + joined * len(join))
        self.begin = self.end - length
        parts = [part for ids, j in zip(texts, joined) for part in ((join, ids) if j else (ids,))]
        self.ids = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
        is_text = np.ones(len(self.ids), dtype=np.int64)
        for begin in self.begin[joined]:
            is_text[begin - len(join) : begin] = 0
        self.seen = np.append(0, np.cumsum(is_text))  # seen[p]: tokens of text, not of joins, before position p

    def left(self, position: int, n: int) -> int:
        """Return the latest position with n tokens of text between it and `position`, or the session's start."""
        if n == 0:
            return position
        aim = self.seen[position] - n
        return 0 if aim < 0 else int(np.searchsorted(self.seen, aim, side="right")) - 1

    def right(self, position: int, n: int) -> int:
        """Return the earliest position with n tokens of text between `position` and it, or the session's end."""
        if n == 0:
            return position
        return min(int(np.searchsorted(self.seen, self.seen[position] + n, side="left")), len(self.ids))


def _session_windows(
    context: Context, form: WindowFormat, session: SessionTokens, chosen: Set[int]
) -> list[tuple[Window, int]]:
    """Pairs of a window that `chosen` utterances are kept from, and its first text token's position in the session.

    KeptTokens.utterance counts the session's. A window does not depend on which other utterances are chosen.
    """
    windows: list[tuple[Window, int]] = []
    for first, last in _window_groups(context, form, session):
        if not chosen.isdisjoint(range(first, last)):
            windows += _cut_windows(context, form, session, first, last)
    for window, _ in windows:
        window.kept = [k for k in window.kept if k.utterance in chosen]
    return [(window, a) for window, a in windows if window.kept]


def _window_groups(context: Context, form: WindowFormat, session: SessionTokens) -> list[tuple[int, int]]:
    """Runs [first, last) of utterances that share a window; utterances without tokens are in none.

    Groups are counted from the session's beginning, so they depend on the session alone and not on its shards.
    """
    full = np.flatnonzero(session.end > session.begin).tolist()
    shared = context.size > 0 and (context.block or form.causal or (context.left > 0 and context.right > 0))
    if not shared:
        return [(u, u + 1) for u in full]
    most = max(1, min(form.core, form.text_limit - context.size))
    groups: list[tuple[int, int]] = []
    for u in full:
        together = bool(groups) and session.end[u] - session.begin[groups[-1][0]] <= most
        groups.append((groups.pop()[0] if together else u, u + 1))
    return groups


def _extent(context: Context, session: SessionTokens, first: int, last: int) -> tuple[int, int]:
    """Return the positions [begin, end) of a session that the utterances [first, last) and their context take."""
    begin = session.left(int(session.begin[first]), context.left)
    return begin, session.right(int(session.end[last - 1]), context.right)


def _suffix(context: Context, form: WindowFormat) -> Sequence[int]:
    """The special ids after a text. They would tell a block how much comes after it."""
    return () if context.block else form.suffix


def _cut_windows(
    context: Context, form: WindowFormat, session: SessionTokens, first: int, last: int
) -> list[tuple[Window, int]]:
    """Windows over the utterances [first, last) and their context: one, or several overlapping ones."""
    begin, end = _extent(context, session, first, last)
    suffix = _suffix(context, form)
    limit = form.window - len(form.prefix) - len(suffix)
    excess = max(0, end - begin - limit)
    steps = -(-excess // (limit - limit // 2))
    starts = [begin + (round(i * excess / steps) if steps else 0) for i in range(steps + 1)]
    spans = [(s, min(s + limit, end)) for s in starts]
    source = _source_windows(spans, begin, end, form.causal)
    windows: list[tuple[Window, int]] = []
    for number, (a, b) in enumerate(spans):
        kept = []
        for u in range(first, last):
            own = np.flatnonzero(source[session.begin[u] - begin : session.end[u] - begin] == number)
            if len(own):
                t0, t1 = int(own[0]), int(own[-1]) + 1
                kept.append(KeptTokens(u, t0, t1, int(session.begin[u]) + t0 - a + len(form.prefix)))
        if not kept:
            continue
        ids = np.concatenate([form.prefix, session.ids[a:b], suffix]).astype(np.int32)
        blocks = None
        if context.block:
            # Block 0 is the prefix and the left context. Each utterance is a block with the join before it.
            inner = 1 + np.searchsorted(session.end[first:last], np.arange(a, b), side="right")
            inner[np.arange(a, b) < session.begin[first]] = 0
            blocks = np.concatenate([np.zeros(len(form.prefix)), inner]).astype(np.int32)
        windows.append((Window(ids, blocks, kept), a))
    return windows


def _source_windows(spans: list[tuple[int, int]], begin: int, end: int, causal: bool) -> np.ndarray:
    """Return the window that each position of [begin, end) is kept from: the one whose nearer cut is farthest.

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


def item_windows(
    context: Context, form: WindowFormat, texts: TokenLists, sessions: np.ndarray, positions: Sequence[int] | np.ndarray
) -> ItemWindows:
    """Return the windows of some utterances of a corpus. Windows with the same ids and blocks are run once.

    Arguments:
        texts, sessions: token ids and session numbers of the whole corpus, in its order.
        positions: the utterances' places in that order; -1 for one that is not to be run. Other utterances serve as
            context only. KeptTokens.utterance and the result's arrays count along `positions`.
    """
    count = len(positions)
    result = ItemWindows([], np.zeros(count, np.uint64), *np.zeros((2, count), np.int32))
    inputs: list[list[bytes]] = [[] for _ in range(count)]
    known: dict[bytes, Window] = {}
    number = {int(p): i for i, p in enumerate(positions) if p >= 0}
    rest = sorted(number)
    at = 0
    while at < len(rest):
        begin, end = session_bounds(sessions, rest[at])
        stop = bisect_left(rest, end, at)
        session = SessionTokens(texts[begin:end], form.join)
        seen: set[int] = set()
        for window, a in _session_windows(context, form, session, {p - begin for p in rest[at:stop]}):
            kept = [KeptTokens(number[k.utterance + begin], k.first, k.last, k.at) for k in window.kept]
            b = a + len(window.ids) - len(form.prefix) - (0 if context.block else len(form.suffix))
            for k, local in zip(kept, window.kept):
                hidden = form.causal or context.block  # what follows is in the window, but cannot be seen
                n = k.at + k.last - k.first if hidden else len(window.ids)
                blocks = b"" if window.blocks is None else window.blocks[:n].tobytes()
                head = f"{k.first} {k.last} {k.at} {n}".encode()
                inputs[k.utterance].append(head + b"\0" + window.ids[:n].tobytes() + blocks)
                text_begin, text_end = session.begin[local.utterance], session.end[local.utterance]
                if k.utterance not in seen:
                    seen.add(k.utterance)
                    result.context_left[k.utterance] = session.seen[text_begin] - session.seen[min(a, text_begin)]
                right = 0 if hidden else session.seen[max(b, text_end)] - session.seen[text_end]
                result.context_right[k.utterance] = right
            key = window.ids.tobytes() + (b"" if window.blocks is None else b"|" + window.blocks.tobytes())
            if key in known:
                known[key].kept.extend(kept)
            else:
                known[key] = window
                window.kept = kept
        at = stop
    result.windows = list(known.values())
    result.input_hash[:] = [hash64(b"\1".join(parts)) for parts in inputs]
    return result


def window_lengths(context: Context, form: WindowFormat, length: np.ndarray, sessions: np.ndarray) -> np.ndarray:
    """Return the tokens of the longest window of each utterance of a corpus, or 0 if it has no tokens: int64 [U].

    Arguments:
        length: tokens of each utterance.
        sessions: session numbers, in the order of the corpus.
    """
    around = len(form.prefix) + len(_suffix(context, form))
    most = form.window - around
    result = np.where(length > 0, np.minimum(length, most) + around, 0)
    bounds = [0, *(np.flatnonzero(np.diff(sessions)) + 1).tolist(), len(sessions)]
    for begin, end in pairwise(bounds):
        if not context.size or end - begin == 1:
            continue  # without neighbours
        texts = [np.zeros(n, np.int32) for n in length[begin:end].tolist()]
        session = SessionTokens(texts, form.join)
        for first, last in _window_groups(context, form, session):
            a, b = _extent(context, session, first, last)
            result[begin + first : begin + last] = min(b - a, most) + around
    result[length == 0] = 0
    return result


def session_bounds(sessions: np.ndarray, u: int) -> tuple[int, int]:
    """Return the run [begin, end) of utterances of u's session; sessions are contiguous in the order of a corpus."""
    begin = end = u
    while begin > 0 and sessions[begin - 1] == sessions[u]:
        begin -= 1
    while end < len(sessions) and sessions[end] == sessions[u]:
        end += 1
    return begin, end
