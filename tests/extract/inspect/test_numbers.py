"""stats, similarity, neighbours and compare: against plain numpy on the same states, and on planted ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stillhouse.data.errors import NoStoreError, UsageError
from stillhouse.extract.inspect import sample as reading
from stillhouse.extract.inspect.facts import diff as differing
from stillhouse.extract.inspect.facts import tree as layout
from stillhouse.extract.inspect.facts.utterance import TokenFacts
from stillhouse.extract.inspect.numbers import neighbours, similarity, statistics
from stillhouse.extract.inspect.show import numbers as rendering_numbers
from stillhouse.extract.inspect.show.numbers import around
from stillhouse.extract.store import View

WORDS = [" ".join(f"w{(i * 13 + j * j * 5) % 90}" for j in range(3 + i % 9)) for i in range(120)]


@pytest.fixture(scope="module")
def decoder(known, tmp_path_factory):
    """A decoder, whose first tokens are six times as long."""
    teacher = known.Teacher(kind="decoder")
    return known.build(tmp_path_factory.mktemp("decoder"), WORDS, contexts=("alone",), teacher=teacher)


@pytest.fixture(scope="module")
def many(known, tmp_path_factory):
    return known.build(tmp_path_factory.mktemp("many"), WORDS, per_session=8)


def all_states(store, view):
    gathered = store.gather(store.utterance_ids, [view])
    lengths = gathered.lengths["known"]
    first = np.zeros(lengths.sum(), bool)
    first[np.cumsum(lengths) - lengths] = True
    return gathered.states[view].astype(np.float64), first


def test_stats_against_plain_numpy(decoder, known, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_TOKENS", 100)  # several blocks
    view = View("known", "alone", 2)
    [found] = statistics.statistics(decoder, [view], full=True)
    states, first = all_states(decoder, view)
    rest = states[~first]
    assert (found.tokens, found.first_tokens, found.utterances) == (len(rest), 120, 120)
    norms = np.linalg.norm(rest, axis=1)
    assert found.norm_mean == pytest.approx(norms.mean(), rel=1e-5)
    assert found.norm_std == pytest.approx(norms.std(), rel=1e-3)
    assert found.first_norm_mean == pytest.approx(np.linalg.norm(states[first], axis=1).mean(), rel=1e-5)
    assert found.first_norm_mean > 5 * found.norm_mean
    unit = rest / norms[:, None]
    cosines = unit @ unit.T
    pairs = ~np.eye(len(unit), dtype=bool)
    assert found.anisotropy == pytest.approx(cosines[pairs].mean(), rel=1e-4)
    p = np.linalg.eigvalsh(np.cov(rest.T, bias=True))
    p = np.maximum(p, 0) / p.sum()
    assert found.effective_rank == pytest.approx(np.exp(-sum(x * np.log(x) for x in p if x > 1e-12)), rel=1e-3)
    assert found.dead == [known.DEAD] and [d.dimension for d in found.outliers] == [known.OUTLIER]
    assert found.outliers[0].mean == pytest.approx(rest[:, known.OUTLIER].mean(), rel=1e-5)
    assert found.not_finite == 0


def test_stats_count_what_is_not_finite(many, monkeypatch):
    view = View("known", "alone", 0)
    whole = statistics.statistics(many, [view], full=True)[0]
    gather = type(many).gather

    def poisoned(self, ids, views):
        found = gather(self, ids, views)
        found.states[view][1] = np.nan
        return found

    monkeypatch.setattr(type(many), "gather", poisoned)
    [found] = statistics.statistics(many, [view], full=True)
    assert found.not_finite == 1 and found.tokens == whole.tokens - 1
    assert np.isfinite(found.effective_rank) and np.isfinite(found.anisotropy)


def test_a_sample_is_whole_utterances_and_repeats(many):
    views = [View("known", "alone", 0)]
    rows = reading.sample_rows(many, views, 50, seed=3)
    lengths, _, _ = many.tokens([many.index.id(int(r)) for r in rows], "known")
    assert 50 <= lengths.sum() < 50 + lengths.max()
    assert np.array_equal(rows, reading.sample_rows(many, views, 50, seed=3))
    assert not np.array_equal(rows, reading.sample_rows(many, views, 50, seed=4))
    assert len(reading.sample_rows(many, views, None)) == 120


def test_the_rank_of_wide_states_is_that_of_some_tokens(decoder, known, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_TOKENS", 100)  # several blocks
    monkeypatch.setattr(statistics, "RANK_SIDE", 11)
    view = View("known", "alone", 2)
    states, first = all_states(decoder, view)
    drawn = states[~first][:: -(-len(states) // 11)]
    [found] = statistics.statistics(decoder, [view])
    assert len(drawn) <= 11 and found.rank_tokens == len(drawn) < found.tokens
    p = np.maximum(np.linalg.eigvalsh(np.cov(drawn.T, bias=True)), 0)
    p = p[p > 1e-12] / p.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    [whole] = statistics.statistics(decoder, [view], full=True)
    assert whole.rank_tokens == whole.tokens and whole.dead == found.dead == [known.DEAD]
    assert [d.dimension for d in whole.outliers] == [d.dimension for d in found.outliers] == [known.OUTLIER]
    assert "of 10 tokens, which bounds it" in rendering_numbers.statistics([found]).replace("\n", " ")
    assert "bounds" not in rendering_numbers.statistics([whole])


def test_samples_are_smaller_where_views_are_wide_or_many(many, monkeypatch):
    monkeypatch.setattr(reading, "SAMPLE_NUMBERS", 12 * 2 * 150)
    monkeypatch.setattr(reading, "LEAST_TOKENS", 60)
    views = [View("known", c, k) for c in ("alone", "both:8") for k in (0, 2, 4)]
    assert [reading.sample_size(many, views[:n], 200) for n in (1, 2, 3, 6)] == [200, 150, 100, 60]

    def tokens(**how):
        found = statistics.statistics(many, views[:3], **how)
        return {s.tokens + s.first_tokens for s in found}

    assert max(tokens()) < 111 <= 120 <= min(tokens(tokens=120)) < min(tokens(full=True))
    assert similarity.similarity(many, views[:3]).places == 100
    monkeypatch.setattr(similarity, "GRAM_NUMBERS", 3 * 50**2)
    assert similarity.similarity(many, views[:3]).places == 50
    assert [n.tokens for n in differing.diff(many, many).numbers] == pytest.approx([65] * 6, abs=5)
    near = neighbours.nearest(many, views[0], many.utterance_ids[7], "1", tokens=80)
    assert 60 <= near.searched < 100 and len(near.neighbours) == 10


def test_a_block_of_wide_states_is_no_larger_and_nothing_stays_mapped(many, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_NUMBERS", 12 * 40)
    view, rows = View("known", "alone", 0), np.arange(len(many.index))
    rows = rows[many.lengths("known") > 0]
    sizes = []
    for part in reading.blocks(many, "known", rows):
        sizes.append(len(reading.read_states(many, view, reading.ids_of(many, part)).states[view]))
        assert not many._states.handles._open
    assert sum(sizes) == many.lengths("known").sum() and max(sizes) < 40 + 12


def test_views_evenly_apart():
    views = [View("t", c, k) for c in ("alone", "both:8", "past:8") for k in range(33)]
    some = reading.representative(views, 24)
    assert len(some) == 24 and some == sorted(some)
    assert {(v.context, v.layer) for v in some} >= {(c, k) for c in ("alone", "both:8", "past:8") for k in (0, 32)}
    assert reading.representative(views, 99) == views and reading.representative(views[:5], 1) == views[:1]
    contexts = [View("t", f"past:{n}", k) for n in range(40) for k in (3, 6)]
    some = reading.representative(contexts, 24)
    assert len(some) == 24 and some[0] == contexts[0] and some[-1] == contexts[-1]


def test_a_partial_store_is_sampled_where_it_is_extracted(partial):
    both = View("known", "both:8", 0)
    rows = reading.available_rows(partial, [both])
    assert len(rows) in (204, 306)  # two shards of five, or three
    assert partial.has([partial.index.id(int(r)) for r in rows], both).all()
    [found] = statistics.statistics(partial, [both], full=True)
    assert found.tokens + found.first_tokens == 20 * len(rows)


def biased_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def test_cka_of_planted_views():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 30))
    rotation = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    unrelated = rng.normal(size=(600, 200))
    gram = {n: similarity.centred_gram(v) for n, v in {"x": x, "same": 7 * x @ rotation + 3, "no": unrelated}.items()}

    def cka(a, b):
        return (gram[a] * gram[b]).sum()

    assert cka("x", "x") == pytest.approx(1) and cka("x", "same") == pytest.approx(1)
    # where the plain estimate sees a likeness that is not there
    assert abs(cka("x", "no")) < 0.01 < 0.1 < biased_cka(x, unrelated)
    mixed = similarity.centred_gram(np.concatenate([x, rng.normal(size=(600, 30))], 1))
    # half of the variance is x's: <K, K + L> / |K| |K + L| = 1 / sqrt 2
    assert (gram["x"] * mixed).sum() == pytest.approx(np.sqrt(0.5), abs=0.02)


def test_similarity_of_a_store(many):
    views = [View("known", c, k) for c in ("alone", "both:8") for k in (0, 4)]
    found = similarity.similarity(many, views, tokens=400)
    cka = np.array(found.cka)
    assert found.views == [v.address for v in views] and found.places == 400
    np.testing.assert_allclose(np.diag(cka), 1, atol=1e-4)
    np.testing.assert_allclose(cka, cka.T, atol=1e-4)
    assert cka[0, 2] == pytest.approx(1, abs=1e-3)  # layer 0 of this teacher knows no context
    assert cka[0, 1] < 0.999


def test_places_of_another_tokeniser_are_the_tokens_over_the_same_characters(monkeypatch):
    class Two:
        """One utterance: "unlikely end", cut as un|likely|end and unlike|ly|end, the second without its last token."""

        index = type("Index", (), {"id": staticmethod(lambda row: "u")})

        def tokens(self, ids, name):
            span = np.array([[0, 2], [2, 8], [9, 12]] if name == "a" else [[0, 6], [6, 8]])
            return np.array([len(span)]), np.zeros(len(span)), span

    monkeypatch.setattr(similarity, "sample_rows", lambda *_: np.array([0]))
    ids, tokens = similarity.places(Two(), [View("a", "alone", 1), View("b", "alone", 1)], 10, 0)
    assert ids == ["u"]
    assert tokens["a"][0].tolist() == [0, 1] and tokens["b"][0].tolist() == [0, 0]


@pytest.mark.parametrize("standardise", [False, True])
def test_neighbours_are_exact(many, standardise, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_TOKENS", 64)
    view = View("known", "both:8", 4)
    ids = many.utterance_ids
    found = neighbours.nearest(many, view, ids[7], "1", count=12, standardise=standardise)
    gathered = many.gather(ids, [view])
    lengths = gathered.lengths["known"]
    states = gathered.states[view].astype(np.float32)
    if standardise:
        mean, std = many.norm(view)
        states = (states - mean) / std
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    of = np.repeat(np.arange(len(ids)), lengths)
    token = np.concatenate([np.arange(n) for n in lengths])
    cosine = states @ states[(of == 7) & (token == 1)][0]
    cosine[of == 7] = -2
    expected = np.sort(cosine)[::-1][:12]
    np.testing.assert_allclose([n.cosine for n in found.neighbours], expected, atol=2e-5)
    place = {(ids[o], t): c for o, t, c in zip(of, token, cosine)}
    for n in found.neighbours:
        assert place[n.utterance, n.token] == pytest.approx(n.cosine, abs=2e-5)
        assert n.sentence[n.begin : n.end] == n.piece
    assert found.searched == (of != 7).sum()


def test_the_bank_of_the_river_and_the_bank_that_lends(store, stillhouse):
    """In layer 0, alone, every "bank" is the same; with the context in, those of one session are nearer."""
    first = neighbours.nearest(store, View("known", "alone", 0), "s00-0000", "bank", count=3)
    assert {(n.utterance, n.piece) for n in first.neighbours} == {
        ("s00-0001", "bank"), ("s01-0003", "bank"), ("s01-0005", "bank"),
    }  # fmt: skip
    assert all(n.cosine == pytest.approx(1, abs=1e-5) for n in first.neighbours)
    deep = neighbours.nearest(store, View("known", "both:8", 4), "s00-0000", "bank", count=1)
    assert deep.neighbours[0].utterance == "s00-0001"
    shown = stillhouse("inspect", "neighbours", store.path, "s00-0000:bank", "--view", "known/*/4", "--count", 1)
    assert shown.code == 0 and shown.out.count("[bank]") == 4
    every = stillhouse("inspect", "neighbours", store.path, "s00-0000:bank", "--json")
    assert [n["view"] for n in json.loads(every.out)["views"]] == [v.address for v in store.views]
    wrong = stillhouse("inspect", "neighbours", store.path, "s00-0000:wharf", "--view", "known/alone/4")
    assert wrong.code == 10 and "the river bank was wet" in wrong.err
    assert stillhouse("inspect", "neighbours", store.path, "s00-0000", "--view", "known/alone/4").code == 2


def facts_of(*pieces):
    return [TokenFacts(0, piece, b, e, None) for piece, b, e in pieces]


def test_words_are_found_across_pieces():
    tokens = facts_of(
        ("play", 0, 4), ("##ing", 4, 7), ("Ġplay", 8, 12), ("▁7", 13, 14), ("ful", 15, 18), ("ly", 18, 20)
    )
    assert neighbours.words(tokens) == [[0, 1], [2], [3], [4, 5]]
    assert neighbours.find_word(tokens, "PLAYING", "u") == [0, 1]
    assert neighbours.find_word(tokens, "play", "u") == [2]
    assert neighbours.find_word(tokens, "ly", "u") == [5]
    assert neighbours.find_word(tokens, "4", "u") == [4]
    assert neighbours.find_word(tokens, "7", "u") == [3]
    with pytest.raises(NoStoreError, match="no word 'play#2'"):
        neighbours.find_word(tokens, "play#2", "u")


def test_compare(store, stillhouse):
    views = [View("known", "alone", 4), View("known", "both:8", 4), View("known", "alone", 0)]
    first, second = neighbours.compare(store, "s00-0001", views)
    states = [v.astype(np.float64) for v in store.gather(["s00-0001"], views).states.values()]
    for found, other in ((first, states[1]), (second, states[2])):
        for i, moved in enumerate(found.tokens):
            a, b = states[0][i], other[i]
            assert moved.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
            assert moved.distance == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), abs=1e-5)
    with pytest.raises(UsageError, match="1 views to compare"):
        neighbours.compare(store, "s00-0001", views[:1])
    shown = stillhouse(
        "inspect", "compare", store.path, "s00-0001", "--views", "known/alone/0,4,known/both:8/4", "--json"
    )
    assert [c["b"] for c in json.loads(shown.out)["views"]] == ["known/alone/4", "known/both:8/4"]
    every = stillhouse("inspect", "compare", store.path, "s00-0001", "--json")
    assert [c["b"] for c in json.loads(every.out)["views"]] == [v.address for v in store.views[1:]]


def test_tree_counts_every_file_once(store, stillhouse):
    nodes = layout.tree(store)
    top = [n for n in nodes if n.depth == 0]
    assert sum(n.files for n in top) == sum(p.is_file() for p in store.path.rglob("*"))
    hidden = next(n for n in nodes if n.path == "data.zarr/known/hidden")
    assert (hidden.kind, hidden.shape, hidden.dtype) == ("array", [2, 3, 2048, 12], "float16")
    assert hidden.dimensions == ["context", "layer", "token", "dimension"]
    out = " ".join(stillhouse("inspect", "tree", store.path).out.split())
    assert "float16 [context 2, layer 3, token 2,048, dimension 12]" in out


def test_a_sentence_is_cut_around_its_word():
    sentence = "one two three four five six seven"
    assert around(sentence, 8, 13, 80) == "one two [three] four five six seven"
    cut = around(sentence, 14, 18, 20)
    assert "[four]" in cut and len(cut) <= 20 and cut.startswith("…") and cut.endswith("…")
    assert around(sentence, 0, 3, 12) == "[one] two t…"
    assert around("short", 0, 5, 3) == "[short]"
    # Of an hour's transcript no more is looked at than fits
    long = "ab " * 200_000
    cut = around(long, 300_000, 300_002, 40)
    assert "[ab]" in cut and len(cut) == 40 and cut.startswith("…") and cut.endswith("…")


@pytest.mark.parametrize("command", [["stats"], ["similarity"], ["tree"]])
def test_commands_print_text_and_json(many, stillhouse, command):
    text = stillhouse("inspect", command[0], many.path)
    assert text.code == 0 and text.out.count("\n") > 5 and "\x1b" not in text.out
    assert json.loads(stillhouse("inspect", command[0], many.path, "--json").out)["schema"].endswith("/1")
