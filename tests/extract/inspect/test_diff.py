"""diff finds every planted difference between two stores, and no other."""

from __future__ import annotations

import json
import shutil

import pytest

from stillhouse.extract.inspect.facts import diff as differing
from stillhouse.extract.inspect.facts import store as facts
from stillhouse.extract.store import Store


@pytest.fixture(scope="module")
def other(known, tmp_path_factory) -> Store:
    """A store with one changed text, one more utterance, another order of sessions, one layer less, and float32."""
    texts = [*known.TEXTS, "ONE MORE"]
    texts[1] = "HE SAT BY THE BANK"
    folder = tmp_path_factory.mktemp("other")
    return known.build(folder, texts, layers=(0, 4), dtype="float32", seed=1)


def test_equal_stores_do_not_differ(store, known, tmp_path, stillhouse):
    twin = known.build(tmp_path)
    found = differing.diff(store, twin, full=True)
    assert found.same and found.utterances.both == 6
    assert {n.view for n in found.numbers} == {v.address for v in store.views}
    assert all((n.tokens, n.equal, n.largest) == (26, 1, 0) for n in found.numbers)
    done = stillhouse("inspect", "diff", store.path, twin.path)
    assert done.code == 0 and done.out.endswith("the stores are equal\n")


def test_differences_are_listed(store, other, stillhouse):
    found = differing.diff(store, other, full=True)
    assert not found.same
    assert [(s.setting, s.a, s.b) for s in found.settings] == [("dtype", "float16", "float32")]
    assert found.views_only_a == ["known/alone/2", "known/both:8/2"] and found.views_only_b == []
    u = found.utterances
    assert (u.both, u.only_a, u.only_b, u.changed, u.tokenised) == (6, 0, 1, 1, 0)
    assert (u.only_b_ids, u.changed_ids) == (["s02-0006"], ["s00-0001"])
    alone = next(n for n in found.numbers if n.view == "known/alone/0")
    # 26 tokens less the five of the changed text; half precision rounds 30-odd by 2^-6 / 2 at most
    assert alone.tokens == 21 and 0 < alone.largest <= 2**-6 and alone.equal < 1
    assert alone.cosine == pytest.approx(1, abs=1e-5) and alone.largest_share < 1e-3
    # the neighbour's text has changed, so its context has
    both = next(n for n in found.numbers if n.view == "known/both:8/4")
    assert both.largest > 3 * alone.largest
    done = stillhouse("inspect", "diff", store.path, other.path)
    assert done.code == 1 and "dtype is float16 in a, float32 in b" in done.out and "the stores differ" in done.out
    assert json.loads(stillhouse("inspect", "diff", store.path, other.path, "--json").out)["same"] is False


def test_other_tokens_of_the_same_text(store, known, tmp_path):
    other = known.build(tmp_path, transform="none")
    found = differing.diff(store, other)
    assert [s.setting for s in found.settings] == ["transform"]
    u = found.utterances
    assert (u.changed, u.tokenised) == (0, 5) and "s01-0004" not in u.tokenised_ids  # it has no tokens
    assert found.numbers == []


def test_stores_without_anything_in_common(store, known, tmp_path):
    other = known.build(tmp_path, ["NOTHING ALIKE"], per_session=1)
    found = differing.diff(store, other)
    assert (found.utterances.both, found.utterances.only_a, found.utterances.only_b) == (1, 5, 0)
    assert found.utterances.changed_ids == ["s00-0000"] and found.numbers == []


def test_a_partial_store_is_compared_as_far_as_it_goes(partial, stillhouse):
    found = differing.diff(partial, partial, full=True)
    both = facts.view_facts(partial, partial.planned_views)[-1].tokens  # a writer may have been a unit ahead
    assert found.same and 0 < both < 9000 and {n.tokens for n in found.numbers} == {9000, both}
    sampled = differing.diff(partial, partial, tokens=100)
    assert all(100 <= n.tokens < 140 for n in sampled.numbers)


def test_a_store_that_lacks_states_is_not_the_same(partial, tmp_path, stillhouse):
    path = tmp_path / "less.zarr"
    shutil.copytree(partial.path, path)
    shard = Store.open(path).plan.latest("known").shards[1]
    next(path.glob("commits/known/alone/1.*.json")).unlink()
    done = stillhouse("inspect", "diff", path, partial.path)
    assert done.code == 1 and f"known/alone/2: states of {9000 - shard.rows:,} tokens in a, of 9,000 in b" in done.out
    assert stillhouse("inspect", "diff", partial.path, partial.path).code == 0
