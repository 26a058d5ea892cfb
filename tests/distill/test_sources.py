"""View patterns over several stores: what each store is read for, and what cannot be meant."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillhouse.data.errors import ConfigError, NoStoreError
from stillhouse.distill import TargetReader, Transfer
from stillhouse.distill.views import resolve_views
from stillhouse.extract.store import View


def holding(path: str, *addresses: str) -> SimpleNamespace:
    views = [View(t, c, int(n)) for t, c, n in (a.split("/") for a in addresses)]

    def resolve(pattern: str) -> list[View]:
        found = [v for v in views if fnmatchcase(v.address, pattern)]
        if not found:
            raise NoStoreError(f"no view matches {pattern!r}", where=path)
        return found

    return SimpleNamespace(path=Path(path), address=path, views=views, resolve=resolve)


def addresses(sources: list) -> list[tuple[str, list[str]]]:
    return [(str(store.path), [v.address for v in views]) for store, views in sources]


A = holding("a.zarr", "minilm/alone/3", "minilm/alone/6", "minilm/both:8/6")
B = holding("b.zarr", "smollm/alone/30", "smollm/past:64/30")


def test_every_pattern_is_taken_over_all_stores() -> None:
    found = resolve_views([A, B], ["*/alone/*", "minilm/both:8/*", "minilm/alone/6", "smollm/past:64/30"])
    assert addresses(found) == [
        ("a.zarr", ["minilm/alone/3", "minilm/alone/6", "minilm/both:8/6"]),
        ("b.zarr", ["smollm/alone/30", "smollm/past:64/30"]),
    ]
    assert addresses(resolve_views([A, B], ["smollm/*"])) == [("b.zarr", ["smollm/alone/30", "smollm/past:64/30"])]


def test_a_pattern_that_matches_nowhere_names_what_there_is() -> None:
    with pytest.raises(NoStoreError, match=r"'bert/\*'.*a\.zarr: minilm/alone/3.*b\.zarr: smollm/alone/30"):
        resolve_views([A, B], ["minilm/*", "bert/*"])
    with pytest.raises(NoStoreError, match=r"a\.zarr: no view matches 'bert/\*'"):
        resolve_views([A], ["bert/*"])


def test_an_address_in_two_stores_is_refused_with_what_to_do() -> None:
    other = holding("c.zarr", "minilm/alone/6", "minilm/past:8/6")
    with pytest.raises(ConfigError, match=r"a\.zarr and c\.zarr both hold minilm/alone/6.*--name"):
        resolve_views([A, other], ["minilm/alone/6"])
    # Other views of the same teacher are no contradiction
    assert len(resolve_views([A, other], ["minilm/*:8/6"])) == 2


def test_two_stores_of_the_same_teacher_and_two_teachers_in_one_loss(fakes) -> None:
    first, second = fakes.small_store(0), fakes.small_store(1)
    first.views = [v for v in first.views if v.teacher == "pieces"]
    second.views = [v for v in second.views if v.address in ("pieces/alone/3", "words/both:8/2")]
    reader = TargetReader([(first, first.views[1:]), (second, second.views)])
    assert [v.address for v in reader.views] == ["pieces/alone/6", "pieces@2/alone/3", "words/both:8/2"]
    transfer = Transfer(reader.views, 8, embeddings=reader.embeddings, aligner="attention")
    assert [head.out_features for head in transfer.heads] == [6, 6, 4]
