"""Every context equals plain transformers on the same ids, and no later token leaks into a past context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.data.errors import TeacherError, UsageError
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.teacher.model import Teacher

from ..conftest import loaded, make_corpus

TEXTS = [
    "the rain fell on the roof",
    "she would not wear it",
    "a knight rode",
    "their boat was there by the weir",
    "the tea was cold",
    "naïve café owners 你好 😀",
    "it's done and the bread was old",
    "we",
]
CASES = [
    ("bert", "past:6"),
    ("bert", "past:6+block"),
    ("bert", "future:6"),
    ("bert", "both:6"),
    ("minilm", "past:6"),
    ("minilm", "past:6+block"),
    ("minilm", "both:6"),
    ("gpt2", "past:20"),
    ("llama", "past:20"),
]


def stored(
    root: Path, texts: list[str], teacher: Teacher, contexts: list[str], layers: list[int] | None = None
) -> Store:
    layers = list(range(teacher.depth + 1)) if layers is None else layers
    request = Request("t", layers, contexts, dtype="float32", core_tokens=14)
    extract(root, make_corpus(texts, per_session=len(texts)), teacher, request)
    return Store.open(root)


def states(store: Store, utterance: int, view: View) -> np.ndarray:
    return store.gather([f"u{utterance}"], [view]).states[view]


def tokens(store: Store, count: int) -> list[np.ndarray]:
    g = store.gather([f"u{i}" for i in range(count)], [View("t", *next((v.context, v.layer) for v in store.views))])
    return np.split(g.token_id["t"], np.cumsum(g.lengths["t"])[:-1])


def close(a: np.ndarray, b: np.ndarray, bound: float = 1e-4) -> bool:
    return bool(np.abs(a - b).max() <= bound * max(np.abs(a).max(), np.abs(b).max()))


@pytest.mark.parametrize("which,context", [c for c in CASES if "block" not in c[1]])
def test_each_utterance_saw_the_recorded_context(
    which: str, context: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The recorded numbers of tokens left and right, written out as one plain pass, give the stored states."""
    teacher = loaded(request.getfixturevalue(which))
    store = stored(tmp_path / "s", TEXTS, teacher, [context])
    ids, t = tokens(store, len(TEXTS)), teacher.tokeniser
    everything = np.concatenate(ids)
    begin = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    left, right = store.context_seen([f"u{i}" for i in range(len(TEXTS))], store.views[0])
    n = int(context.split(":")[1])
    for u in range(len(TEXTS)):
        assert left[u] >= (0 if context.startswith("future") else min(n, begin[u]))
        assert right[u] >= (0 if context.startswith("past") else min(n, begin[-1] - begin[u + 1]))
        a, b = begin[u] - left[u], begin[u + 1] + right[u]
        row = torch.tensor([[*t.prefix, *everything[a:b].tolist(), *t.suffix]])
        if row.shape[1] > teacher.window:
            continue
        with torch.inference_mode():
            plain = teacher.model(input_ids=row, output_hidden_states=True).hidden_states
        at = len(t.prefix) + int(left[u])
        for layer, want in enumerate(plain):
            got = states(store, u, View("t", context, layer))
            if not context.startswith("both"):
                assert close(got, want[0, at : at + len(ids[u])].numpy())
            elif left[u] + right[u] > 2 * n:
                continue  # a shared window: other utterances of the core were seen, too; both recorded
            else:
                assert close(got, want[0, at : at + len(ids[u])].numpy())


def test_both_in_a_shared_window(minilm: Path, tmp_path: Path) -> None:
    """The recorded context is the window's, also for every utterance of a shared window."""
    teacher = loaded(minilm)
    store = stored(tmp_path / "s", TEXTS, teacher, ["both:6"], [6])
    ids, t = tokens(store, len(TEXTS)), teacher.tokeniser
    everything, begin = np.concatenate(ids), np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    view = View("t", "both:6", 6)
    left, right = store.context_seen([f"u{i}" for i in range(len(TEXTS))], view)
    assert (left + right > 12).any()
    for u in range(len(TEXTS)):
        row = [*t.prefix, *everything[begin[u] - left[u] : begin[u + 1] + right[u]].tolist(), *t.suffix]
        with torch.inference_mode():
            plain = teacher.model(input_ids=torch.tensor([row])).last_hidden_state[0]
        at = len(t.prefix) + int(left[u])
        assert close(states(store, u, view), plain[at : at + len(ids[u])].numpy())


@pytest.mark.parametrize("which,context", [c for c in CASES if c[1].startswith("past")])
def test_nothing_later_leaks_into_past(
    which: str, context: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    teacher = loaded(request.getfixturevalue(which))
    before = stored(tmp_path / "a", TEXTS, teacher, [context])
    edited = [*TEXTS[:4], "an edited utterance, much longer than it was before", *TEXTS[5:]]
    after = stored(tmp_path / "b", edited, teacher, [context])
    deep = View("t", context, teacher.depth)
    ids = [f"u{i}" for i in range(len(TEXTS))]
    for u in range(4):
        for view in before.views:
            assert close(states(before, u, view), states(after, u, view), 1e-5)
    same = before.input_hash(ids, deep) == after.input_hash(ids, deep)
    assert same[:4].all() and not same[4:6].any()
    assert not close(states(before, 5, deep), states(after, 5, deep), 1e-3)  # the edit is really seen


@pytest.mark.parametrize("which", ["bert", "minilm"])
def test_nothing_earlier_leaks_into_future(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    teacher = loaded(request.getfixturevalue(which))
    before = stored(tmp_path / "a", TEXTS, teacher, ["future:6"])
    edited = [*TEXTS[:3], "an edited utterance, much longer than it was before", *TEXTS[4:]]
    after = stored(tmp_path / "b", edited, teacher, ["future:6"])
    for u in range(4, len(TEXTS)):
        for view in before.views:
            assert close(states(before, u, view), states(after, u, view), 1e-5)
    deep = View("t", "future:6", teacher.depth)
    assert not close(states(before, 2, deep), states(after, 2, deep), 1e-3)


def test_blocks_against_eager_attention(bert: Path, tmp_path: Path) -> None:
    """The same windows through transformers' eager attention with a mask written out here, pair by pair."""
    from transformers import AutoModel

    from stillhouse.extract.store.views import parse_context
    from stillhouse.extract.teacher.contexts import WindowFormat, item_windows

    teacher = loaded(bert)
    store = stored(tmp_path / "s", TEXTS, teacher, ["past:6+block"], [2])
    ids = tokens(store, len(TEXTS))
    eager = AutoModel.from_pretrained(bert, attn_implementation="eager").eval()
    form = WindowFormat(teacher.tokeniser.prefix, teacher.tokeniser.suffix, [], teacher.window, 14, False)
    work = item_windows(parse_context("past:6+block"), form, ids, np.zeros(len(ids), np.int32), range(len(ids)))
    view, kept = View("t", "past:6+block", 2), 0
    for w in work.windows:
        n, blocks = len(w.ids), w.blocks
        assert blocks is not None
        mask = torch.full((1, 1, n, n), -1e9)
        for q in range(n):
            for k in range(n):
                if blocks[k] <= blocks[q]:
                    mask[0, 0, q, k] = 0
        with torch.inference_mode():
            out = eager(input_ids=torch.tensor(w.ids[None].astype(int)), attention_mask=mask).last_hidden_state[0]
        for p in w.kept:
            got = states(store, p.utterance, view)[p.first : p.last]
            assert close(got, out[p.at : p.at + p.last - p.first].numpy())
            kept += p.last - p.first
    assert kept == sum(map(len, ids))


@pytest.mark.parametrize("which", ["bert", "gpt2"])
def test_texts_beyond_the_window(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A text of three windows: each token equals a plain pass over one window that holds it, and none is lost."""
    teacher = loaded(request.getfixturevalue(which), window=24)
    long = " ".join(TEXTS[:5] * 2)
    store = stored(tmp_path / "s", [long, "we"], teacher, ["alone"], [teacher.depth])
    ids, t = tokens(store, 2)[0], teacher.tokeniser
    room = 24 - len(t.prefix) - len(t.suffix)
    assert len(ids) > 1.5 * room
    found = np.zeros(len(ids), dtype=bool)
    got = states(store, 0, View("t", "alone", teacher.depth))
    for a in range(len(ids) - room + 1):
        row = torch.tensor([[*t.prefix, *ids[a : a + room].tolist(), *t.suffix]])
        with torch.inference_mode():
            plain = teacher.model(input_ids=row).last_hidden_state[0, len(t.prefix) :][:room].numpy()
        found[a : a + room] |= np.abs(got[a : a + room] - plain).max(axis=1) <= 1e-4 * np.abs(plain).max()
    assert found.all()


def test_contexts_refused(gpt2: Path, bert: Path, tmp_path: Path) -> None:
    for context in ("both:4", "future:4", "past:4+block"):
        with pytest.raises(UsageError):
            stored(tmp_path / "s", TEXTS, loaded(gpt2), [context])
    with pytest.raises(UsageError, match="too little"):
        stored(tmp_path / "s", TEXTS, loaded(bert), ["past:40"])


def test_a_model_that_ignores_masks_is_refused(bert: Path, tmp_path: Path) -> None:
    from stillhouse.extract.teacher.model import load_teacher

    teacher = load_teacher(str(bert), device="cpu")

    def without_mask(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        def drop(value: Any) -> Any:
            return None if isinstance(value, torch.Tensor) and value.dim() == 4 else value

        return tuple(map(drop, args)), {k: drop(v) for k, v in kwargs.items()}

    for layer in teacher.model.encoder.layer:
        layer.register_forward_pre_hook(without_mask, with_kwargs=True)
    with pytest.raises(TeacherError, match="mask of blocks"):
        stored(tmp_path / "s", TEXTS, teacher, ["past:6+block"])
