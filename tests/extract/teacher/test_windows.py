"""Windows worked by hand, their properties for any session, and batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.data.errors import UsageError
from stillhouse.extract.store.views import parse_context
from stillhouse.extract.teacher.batching import make_batches
from stillhouse.extract.teacher.contexts import Window, WindowFormat, check_context, item_windows


def ids(*groups: str) -> list[np.ndarray]:
    """ "ab" → [97, 98]: tokens that can be read back."""
    return [np.array([ord(c) for c in g], dtype=np.int32) for g in groups]


def show(window: Window) -> str:
    return "".join(chr(i) for i in window.ids)


def run(
    context: str, texts: list[np.ndarray], *, window: int = 40, core: int = 8, causal: bool = False, join: str = ""
):
    form = WindowFormat([ord("[")], [] if causal else [ord("]")], [ord(c) for c in join], window, core, causal)
    return item_windows(parse_context(context), form, texts, np.zeros(len(texts), np.int32), range(len(texts)))


def test_alone() -> None:
    p = run("alone", ids("abc", "", "de"))
    assert [show(w) for w in p.windows] == ["[abc]", "[de]"]
    assert p.windows[1].kept[0].utterance == 2 and p.windows[1].kept[0].at == 1


def test_both_shares_a_core() -> None:
    p = run("both:3", ids("abcd", "efgh", "ijkl", "mn"))
    assert [show(w) for w in p.windows] == ["[abcdefghijk]", "[fghijklmn]"]
    assert p.context_left.tolist() == [0, 4, 3, 7]  # at least three, unless the session begins
    assert p.context_right.tolist() == [7, 3, 2, 0]


def test_past_of_an_encoder_is_one_window_an_utterance() -> None:
    p = run("past:3", ids("abcd", "ef", "gh"))
    assert [show(w) for w in p.windows] == ["[abcd]", "[bcdef]", "[defgh]"]
    assert p.context_left.tolist() == [0, 3, 3] and p.context_right.tolist() == [0, 0, 0]


def test_future_is_its_mirror() -> None:
    p = run("future:3", ids("hg", "fe", "dcba"))
    assert [show(w) for w in p.windows] == ["[hgfed]", "[fedcb]", "[dcba]"]
    assert p.context_right.tolist() == [3, 3, 0] and p.context_left.tolist() == [0, 0, 0]


def test_past_of_a_decoder_shares_windows() -> None:
    p = run("past:3", ids("abcd", "ef", "gh", "ijklmnop"), causal=True)
    assert [show(w) for w in p.windows] == ["[abcdefgh", "[fghijklmnop"]
    assert p.context_left.tolist() == [0, 4, 6, 3] and p.context_right.tolist() == [0, 0, 0, 0]


def test_past_block_numbers() -> None:
    p = run("past:2+block", ids("abcdefgh", "ij", "kl"))
    assert [show(w) for w in p.windows] == ["[abcdefgh", "[ghijkl"]
    blocks = p.windows[1].blocks
    assert blocks is not None and blocks.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_joins_count_as_nothing_seen() -> None:
    p = run("past:3", ids("ab", "cd", "", "ef"), join="//")
    assert [show(w) for w in p.windows] == ["[ab]", "[ab//cd]", "[b//cd//ef]"]
    assert p.context_left.tolist() == [0, 2, 0, 3]


def test_sessions_do_not_mix() -> None:
    form = WindowFormat([], [], [], 40, 20, False)
    p = item_windows(parse_context("both:9"), form, ids("ab", "cd", "ef"), np.array([0, 1, 1]), range(3))
    assert [show(w) for w in p.windows] == ["ab", "cdef"]


def test_neighbours_outside_of_the_shard_serve_as_context() -> None:
    form = WindowFormat([], [], [], 40, 3, False)
    p = item_windows(parse_context("both:2"), form, ids("abc", "de", "fgh"), np.zeros(3), [1])
    assert [show(w) for w in p.windows] == ["bcdefg"] and len(p.input_hash) == 1
    form = WindowFormat([], [], [], 40, 20, False)
    shared = item_windows(parse_context("both:2"), form, ids("abc", "de", "fgh"), np.zeros(3), [1])
    assert [show(w) for w in shared.windows] == ["abcdefgh"]  # as in the pass of all three


def test_same_windows_run_once() -> None:
    p = run("alone", ids("abc", "de", "abc"))
    assert [show(w) for w in p.windows] == ["[abc]", "[de]"]
    assert [q.utterance for q in p.windows[0].kept] == [0, 2]
    assert p.input_hash[0] == p.input_hash[2] != p.input_hash[1]


def test_longer_than_the_window() -> None:
    """Twelve tokens in windows of eight text tokens: each comes from where the nearer cut is farther away."""
    p = run("alone", ids("abcdefghijkl"), window=10)
    assert [show(w) for w in p.windows] == ["[abcdefgh]", "[efghijkl]"]
    assert [(q.first, q.last, q.at) for w in p.windows for q in w.kept] == [(0, 6, 1), (6, 12, 3)]
    p = run("alone", ids("abcdefghijkl"), window=9, causal=True)  # no right cut: as long as possible in the first
    assert [(q.first, q.last, q.at) for w in p.windows for q in w.kept] == [(0, 8, 1), (8, 12, 5)]


def test_contexts_that_cannot_be() -> None:
    for name in ("past", "past:0", "both:-1", "future:3+block", "beside:4", "past:x"):
        with pytest.raises(UsageError):
            parse_context(name)
    with pytest.raises(UsageError, match="cannot see what follows"):
        check_context(parse_context("both:4"), "decoder", 100)
    with pytest.raises(UsageError, match="N up to 25"):
        check_context(parse_context("both:26"), "encoder", 100)
    check_context(parse_context("past:50"), "decoder", 100)


SESSION = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    lengths=SESSION,
    context=st.sampled_from(["alone", "past:5", "past:5+block", "future:5", "both:5"]),
    causal=st.booleans(),
    join=st.sampled_from(["", "/"]),
    window=st.integers(24, 60),
    core=st.integers(1, 40),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_any_session(
    lengths: list[int], context: str, causal: bool, join: str, window: int, core: int, cut: tuple[int, int]
) -> None:
    if causal and context not in ("alone", "past:5"):
        return
    stamp = iter(range(100, 10_000))
    texts = [np.array([next(stamp) for _ in range(n)], dtype=np.int32) for n in lengths]
    first, last = sorted(min(c, len(texts)) for c in cut)
    form = WindowFormat([1], [] if causal else [2], [ord(c) for c in join], window, core, causal)
    p = item_windows(parse_context(context), form, texts, np.zeros(len(texts), np.int32), range(first, last))
    seen: dict[tuple[int, int], int] = {}
    for w in p.windows:
        assert len(w.ids) <= window and w.ids[0] == 1
        for q in w.kept:
            text = texts[first + q.utterance]
            assert np.array_equal(w.ids[q.at : q.at + q.last - q.first], text[q.first : q.last])
            for t in range(q.first, q.last):
                seen[q.utterance, t] = seen.get((q.utterance, t), 0) + 1
            later = np.concatenate([np.zeros(0, int), *texts[first + q.utterance + 1 :]])
            if context == "past:5" and not causal:
                assert not np.isin(w.ids, later).any()
            if context.endswith("+block"):
                assert w.blocks is not None
                visible = w.ids[w.blocks <= w.blocks[q.at]]
                assert not np.isin(visible, later).any()
            earlier = np.concatenate([np.zeros(0, int), *texts[: first + q.utterance]])
            if context == "future:5":
                assert not np.isin(w.ids, earlier).any()
    assert seen == {(u - first, t): 1 for u in range(first, last) for t in range(lengths[u])}
    everyone = item_windows(parse_context(context), form, texts, np.zeros(len(texts), np.int32), range(len(texts)))
    assert np.array_equal(p.input_hash, everyone.input_hash[first:last])  # whoever else is wanted
    if max(lengths) + 10 + len(lengths) * 2 + 2 <= window:  # no window is cut
        for u in range(first, last):
            if lengths[u] and context != "alone":
                left, right = sum(lengths[:u]), sum(lengths[u + 1 :])
                assert p.context_left[u - first] >= (0 if context == "future:5" else min(5, left))
                assert p.context_right[u - first] >= (min(5, right) if context in ("future:5", "both:5") else 0)


def test_an_edit_changes_only_the_hashes_that_it_touches() -> None:
    texts = ids("abcd", "efgh", "ijkl", "mnop", "qrst")
    changed = [t.copy() for t in texts]
    changed[3][1] = ord("X")
    for context, causal, touched in (
        ("alone", False, [3]),
        ("past:4", False, [3, 4]),
        ("past:4", True, [3, 4]),
        ("past:4+block", False, [3, 4]),
        ("future:4", False, [2, 3]),
    ):
        a, b = run(context, texts, causal=causal, core=4), run(context, changed, causal=causal, core=4)
        assert np.flatnonzero(a.input_hash != b.input_hash).tolist() == touched, context


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), max_size=60), most=st.integers(1, 400), overhead=st.integers(0, 50))
def test_batches(lengths: list[int], most: int, overhead: int) -> None:
    windows = [Window(np.zeros(n, np.int32), None, []) for n in lengths]
    batches = make_batches(windows, most, overhead)
    assert sorted(id(w) for b in batches for w in b) == sorted(id(w) for w in windows)
    for b in batches:
        assert len(b) == 1 or len(b) * max(len(w.ids) for w in b) <= most


def test_batches_by_hand() -> None:
    """Lengths 9 9 9 3 3: two calls waste nothing, one call wastes 12 tokens; a call costs `overhead`."""
    windows = [Window(np.zeros(n, np.int32), None, []) for n in (3, 9, 9, 3, 9)]
    assert [len(b) for b in make_batches(windows, 100, 11)] == [3, 2]
    assert [len(b) for b in make_batches(windows, 100, 13)] == [5]
    assert [len(b) for b in make_batches(windows, 18, 0)][-1] == 2
