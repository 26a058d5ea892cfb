"""`stillhouse views` on stores whose views predict known things."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.data.errors import NoStoreError, StaleError
from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.data.units import Units, train_units
from stillhouse.extract.inspect.numbers import choose_views as choosing
from stillhouse.extract.inspect.numbers.choose_views import choose, suggest
from stillhouse.extract.inspect.numbers.probe import STRENGTHS, Probe, fold_numbers, ridge, tied
from stillhouse.extract.inspect.show import numbers as rendering_numbers
from stillhouse.extract.store import Store
from stillhouse.extract.teacher.tokenizer import Tokens

LETTERS = "abcdefgh"
HERE, TURNED, NOISE, NEXT = 1, 2, 3, 4


class Letters:
    """Letters are tokens with ids from 3. Tokens 1 and 2 surround a text."""

    prefix, suffix, leading_space, hash = [1], [2], False, "letters"

    def join_ids(self, join: str) -> list[int]:
        return []

    def pieces(self, ids: list[int]) -> list[str]:
        return [LETTERS[i - 3] for i in ids]

    def encode(self, texts: list[str], name: str) -> Tokens:
        ids = np.array([3 + LETTERS.index(c) for t in texts for c in t], np.int32)
        span = np.array([(k, k + 1) for t in texts for k in range(len(t))], np.int32).reshape(-1, 2)
        return Tokens(ids, np.array([len(t) for t in texts], np.int32), span)


@pytest.fixture(scope="module")
def planted(known: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Layer 1 is the letter, 2 the same, turned; 3 is noise; 4 is the next letter. Letters are drawn independently."""

    class Planted(known.Teacher):
        def __init__(self) -> None:
            super().__init__(width=16)
            self.tokeniser = Letters()

        def states(self, batch: list[Any], layers: tuple[int, ...]) -> dict[int, torch.Tensor]:
            longest = max(len(w.ids) for w in batch)
            out = {k: np.zeros((len(batch), longest, 16), np.float32) for k in layers}
            turn = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 16)))[0]
            for row, window in enumerate(batch):
                here = np.eye(16)[window.ids]
                noise = np.random.default_rng(zlib.crc32(window.ids.tobytes())).normal(size=here.shape)
                made = {0: self.table[window.ids], HERE: here, TURNED: here @ turn, NOISE: noise}
                made[NEXT] = np.roll(here, -1, axis=0)
                for k in layers:
                    out[k][row, : len(window.ids)] = made[k]
            return {k: torch.from_numpy(v) for k, v in out.items()}

    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(LETTERS), 30)) for _ in range(60)]
    folder = tmp_path_factory.mktemp("planted")
    options = {"layers": (1, 2, 3, 4), "contexts": ("alone",), "transform": "none", "teacher": Planted()}
    store = known.build(folder, texts, **options)
    units = train_units(texts, "characters", transform="none")
    units.save(folder / "units")
    return SimpleNamespace(store=store, corpus=known.corpus_of(folder, texts), units=units, folder=folder)


def test_the_numbers_are_the_planted_ones(planted: SimpleNamespace) -> None:
    c = choose(planted.store, planted.store.views, planted.corpus, planted.units, places=1500)
    of = {int(p.view[-1]): p for p in c.views}
    assert (c.places, c.folds, c.folds_by) == (1500, 5, "session")
    for layer in (HERE, TURNED):
        assert of[layer].here_r2 > 0.99 and of[layer].here_accuracy == 1
        assert abs(of[layer].next_r2) < 0.03 and of[layer].next_accuracy < 0.25
    assert of[NEXT].next_r2 > 0.99 and of[NEXT].next_accuracy == 1 and abs(of[NEXT].here_r2) < 0.03
    assert abs(of[NOISE].here_r2) < 0.03 and abs(of[NOISE].next_r2) < 0.03 and abs(of[NOISE].score) < 0.03
    [static] = c.static
    assert static.view == "known/static" and static.here_r2 > 0.99 and static.here_accuracy == 1
    assert 1 / 8 < c.chance_here < 0.2 and 1 / 9 < c.chance_next < 0.2
    cka = dict(zip(of, c.cka))
    assert cka[HERE][list(of).index(TURNED)] > 0.99 and abs(cka[HERE][list(of).index(NEXT)]) < 0.05


def test_what_is_suggested(planted: SimpleNamespace) -> None:
    """A view of the letter and one of the next letter are suggested, but neither a redundant view nor noise."""
    c = choose(planted.store, planted.store.views, planted.corpus, planted.units, places=1500, pick=3)
    layers = [int(s.view[-1]) for s in c.suggested]
    assert len(layers) == 2 and NEXT in layers and len({HERE, TURNED} & set(layers)) == 1
    assert c.together.here_r2 > 0.99 and c.together.next_r2 > 0.99
    assert c.together.width == 32
    one = choose(planted.store, planted.store.views, planted.corpus, planted.units, places=1500, pick=1)
    assert [s.view for s in one.suggested] == [c.suggested[0].view]


def test_the_rule() -> None:
    """By hand: 0.6 first; then 0.5 · (1 - 0.5) = 0.25 before 0.55 · (1 - 0.9) = 0.055; 0.05 is below a tenth of 0.6."""

    def probed(score: float) -> choosing.Probed:
        return choosing.Probed("v", 1, 0, 0, 0, 0, score)

    cka = np.array([[1, 0.9, 0.5, 0], [0.9, 1, 0.2, 0], [0.5, 0.2, 1, 0], [0, 0, 0, 1]])
    scores = [probed(s) for s in (0.6, 0.55, 0.5, 0.05)]
    assert suggest(scores, cka, 4) == [(0, 0.0), (2, 0.5), (1, 0.9)]
    assert suggest(scores, cka, 1) == [(0, 0.0)]
    assert suggest([probed(-0.1), probed(-0.2)], np.eye(2), 2) == [(0, 0.0)]


def test_the_ridge_against_its_dual() -> None:
    """Every fold by itself, through the Gram matrix instead of the covariance."""
    rng = np.random.default_rng(0)
    n, d = 120, 7
    fold = np.arange(n) % 3
    here, after = rng.integers(0, 4, n), rng.integers(0, 3, n)
    x = np.eye(4)[here] @ rng.normal(size=(4, d)) + rng.normal(size=(n, d))
    got = ridge(x, Probe(here, after, fold))
    z = (x - x.mean(0)) / x.std(0)
    for number, classes in enumerate((here, after)):
        y = np.eye(classes.max() + 1)[classes]
        best = (np.inf, 0.0, 0.0)
        for strength in STRENGTHS:
            error = total = right = 0.0
            for f in range(3):
                a, b = z[fold != f], z[fold == f]
                ya, yb = y[fold != f], y[fold == f]
                am, ym = a.mean(0), ya.mean(0)
                gram = (a - am) @ (a - am).T
                alpha = np.linalg.solve(gram + strength * len(a) * np.eye(len(a)), ya - ym)
                said = (b - am) @ (a - am).T @ alpha + ym
                error += np.square(said - yb).sum()
                total += np.square(yb - ym).sum()
                right += (said.argmax(1) == yb.argmax(1)).sum()
            best = min(best, (error, 1 - error / total, right / n))
        assert got.r2[number] == pytest.approx(best[1], abs=1e-5)
        assert got.accuracy[number] == best[2]
    assert got.r2[0] > 0.1 > got.r2[1]


def test_folds_keep_groups_together_and_are_of_a_size() -> None:
    groups = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 30, 40))
    fold = fold_numbers(groups, 5, seed=3)
    assert all(len(set(fold[groups == g])) == 1 for g in range(40))
    counts = np.bincount(fold, minlength=5)
    assert counts.min() > 0.9 * counts.max()
    assert (fold == fold_numbers(groups, 5, seed=3)).all()


def test_sessions_that_share_a_text_are_one_group() -> None:
    """0 and 1 share a text, 1 and 3 another one; 2 has all of its own. Then a chain of 40 sessions, out of order."""
    sessions, texts = np.array([0, 0, 1, 1, 2, 2, 3]), np.array([7, 8, 8, 9, 4, 4, 9], np.uint64)
    assert tied(sessions, texts).tolist() == [0, 0, 0, 0, 2, 2, 0]
    links = np.random.default_rng(0).permutation(40)
    ring = tied(np.concatenate([links, links]), np.concatenate([np.arange(40), np.roll(np.arange(40), 1)]))
    assert len(set(ring.tolist())) == 1
    assert len(set(tied(links, np.arange(40)).tolist())) == 40


@pytest.mark.parametrize("readings", [1, 4])
def test_a_text_is_in_one_fold_only(
    known: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: int
) -> None:
    """Eight chapters of five sentences, each in words of its own, read once and by four speakers: a chapter, whose
    sentences are each other's contexts, is in one fold, whoever reads it.
    """
    chapters = [[f"w{c}{k}1 w{c}{k}2" for k in range(5)] for c in range(8)]
    texts = [text for chapter in chapters for _ in range(readings) for text in chapter]
    store = known.build(tmp_path, texts, per_session=5, layers=(0, 4))
    corpus, units = known.corpus_of(tmp_path, texts, 5), train_units(texts, "characters")
    seen: list[np.ndarray] = []
    monkeypatch.setattr(choosing, "fold_numbers", lambda *a: seen.append(a[0]) or fold_numbers(*a))
    c = choose(store, store.views, corpus, units)
    assert c.folds_by == "session" and c.utterances == 40 * readings
    assert sorted(np.unique(seen[0], return_counts=True)[1].tolist()) == [5 * 8 * readings] * 8


def test_two_teachers_of_other_tokens_one_of_them_a_decoder_in_int8(
    planted: SimpleNamespace, known: SimpleNamespace, tmp_path: Path
) -> None:
    """A view with one token for each utterance predicts no letter, so a view that does is chosen before it."""
    from stillhouse.extract.pipeline.extract import extract
    from stillhouse.extract.pipeline.request import Request

    shutil.copytree(planted.store.path, tmp_path / "store.zarr")
    teacher = known.Teacher(width=24, kind="decoder", seed=1)
    extract(tmp_path / "store.zarr", planted.corpus, teacher, Request("words", (4,), ("past:8",), dtype="int8"))
    store = Store.open(tmp_path / "store.zarr")
    views = store.resolve(["known/alone/1,4", "words/*/*"])
    c = choose(store, views, planted.corpus, planted.units, places=900)
    assert [(p.view, p.width) for p in c.views] == [
        ("known/alone/1", 16), ("known/alone/4", 16), ("words/past:8/4", 24),
    ]  # fmt: skip
    assert c.views[2].score < 0.05 and {s.view for s in c.suggested} == {"known/alone/1", "known/alone/4"}
    assert [p.view for p in c.static] == ["known/static", "words/static"] and np.isfinite(c.cka).all()


def test_one_text_cannot_be_judged(known: SimpleNamespace, tmp_path: Path) -> None:
    texts = ["w1 w2 w3"] * 12
    store = known.build(tmp_path, texts, per_session=1, layers=(0,))
    with pytest.raises(NoStoreError, match="1 different texts"):
        choose(store, store.views, known.corpus_of(tmp_path, texts, 1), train_units(texts, "characters"))


def test_a_wide_view_is_projected_and_keeps_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    from stillhouse.extract.inspect.numbers import probe

    monkeypatch.setattr(probe, "WIDEST", 32)
    rng = np.random.default_rng(0)
    here = rng.integers(0, 3, 400)
    x = np.eye(3)[here] @ rng.normal(size=(3, 300))
    assert ridge(x, Probe(here, here, np.arange(400) % 5)).r2[0] > 0.99


def test_the_command(planted: SimpleNamespace, stillhouse: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    command = ["views", planted.store.path, "--corpus", planted.folder / "corpus.jsonl"]
    command += ["--units", planted.folder / "units", "--places", 600]
    ran = stillhouse(*command, "--json", "--plot", tmp_path / "cka.png")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["schema"] == "stillhouse.inspect.choice/1" and len(told["views"]) == 4 and len(told["cka"]) == 4
    assert "score times" in told["rule"]
    assert (tmp_path / "cka.png").read_bytes().startswith(b"\x89PNG")
    ran = stillhouse(*command, "--view", "known/alone/1,3", "--pick", 2)
    assert ran.code == 0 and "suggested  known/alone/1\n" in ran.out and "known/static" in ran.out
    assert "known/alone/4" not in ran.out


def test_what_it_refuses(planted: SimpleNamespace) -> None:
    changed = [Utterance(id=u.id, text=u.text[::-1], session=u.session) for u in planted.corpus.utterances]
    with pytest.raises(StaleError, match="differs from the one in the store"):
        choose(planted.store, planted.store.views, Corpus(planted.corpus.path, changed), planted.units)
    few = Corpus(planted.corpus.path, planted.corpus.utterances[:2])
    with pytest.raises(NoStoreError, match="share 60 units of 2 utterances"):
        choose(planted.store, planted.store.views, few, planted.units)


def test_few_sessions_are_folded_by_utterance_and_a_space_is_no_place(known: SimpleNamespace, tmp_path: Path) -> None:
    """A unit without a token, such as a space, is not probed."""
    texts = [f"w{a:02} w{b:02} w{a + b:02}" for a in range(6) for b in range(6)]
    store: Store = known.build(tmp_path, texts, per_session=12, layers=(0, 4))
    units: Units = train_units(texts, "characters")
    c = choose(store, store.views, known.corpus_of(tmp_path, texts, 12), units)
    assert c.folds_by == "utterance" and c.places == 36 * 9 and c.utterances == 36
    assert [p.view for p in c.views] == [v.address for v in store.views]
    assert "by utterance" in rendering_numbers.choice(c)
