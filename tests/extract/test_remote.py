"""Stores in an object store: read and written over S3's protocol, from a server on loopback that is made to fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stillhouse.extract.plan import Request
from stillhouse.extract.run import extract
from stillhouse.extract.store import Store, View
from stillhouse.extract.store import objects as objects_module
from stillhouse.extract.store.verify import verify

from . import s3
from .conftest import loaded, make_corpus
from .test_crash import tree

VIEWS = [View("bert", c, k) for c in ("alone", "both:4") for k in (0, 1, 2)]
REQUEST = Request("bert", [0, 1, 2], ["alone", "both:4"])


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3.moto() as port:
        yield port


@pytest.fixture(scope="module")
def through(server: int) -> Iterator[s3.Proxy]:
    proxy = s3.Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(through: s3.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    """A cache of its own, and an endpoint that this test may harm."""
    through.reset()
    for name, value in {
        "AWS_ENDPOINT_URL": through.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "STILLHOUSE_CACHE": str(tmp_path / "cache"),
        "STILLHOUSE_CACHE_BYTES": str(1 << 30),
        "STILLHOUSE_REMOTE_ATTEMPTS": "4",
    }.items():
        monkeypatch.setenv(name, value)
    yield through
    objects_module.close_all()


@pytest.fixture(scope="module")
def uploaded(server: int, small_store: Path) -> str:
    """The small store as `aws s3 sync` would have brought it there: no parts beside its commits."""
    for path in small_store.rglob("*"):
        if path.is_file() and path.relative_to(small_store).parts[0] not in ("locks", "tmp"):
            s3.put(server, f"up/small/{path.relative_to(small_store)}", path.read_bytes())
    return "s3://bucket/up/small"


def same(url: str, root: Path, ids: list[str] | None = None) -> None:
    there, here = Store.open(url), Store.open(root)
    ids = here.utterance_ids if ids is None else ids
    a, b = there.gather(ids, VIEWS), here.gather(ids, VIEWS)
    for view in VIEWS:
        assert np.array_equal(a.states[view], b.states[view])
        assert np.array_equal(there.input_hash(ids, view), here.input_hash(ids, view))
        assert all(np.array_equal(x, y) for x, y in zip(there.norm(view), here.norm(view)))
    assert np.array_equal(a.token_id["bert"], b.token_id["bert"])


def test_an_uploaded_store_reads_the_same(proxy: s3.Proxy, uploaded: str, small_store: Path) -> None:
    same(uploaded, small_store)
    store = Store.open(uploaded, checksums=True)
    assert store.views == VIEWS and store.resolve("bert/alone/last") == [VIEWS[2]]
    store.gather(store.utterance_ids[:7], VIEWS)
    assert verify(store) == verify(store, data=False) == []


def test_what_was_read_is_not_asked_for_again(proxy: s3.Proxy, uploaded: str) -> None:
    store = Store.open(uploaded)
    ids = store.utterance_ids[:8]
    store.gather(ids, VIEWS)
    before = proxy.counts.total()
    store.gather(ids[::-1], VIEWS)
    assert proxy.counts.total() == before
    Store.open(uploaded).gather(ids, VIEWS[:1])  # another reader: store.json, commits, the shard's size
    assert proxy.counts.total() - before <= 4


def test_extraction_into_a_bucket(proxy: s3.Proxy, server: int, bert: Path, small_store: Path) -> None:
    summary = extract("s3://bucket/made", make_corpus(), loaded(bert), REQUEST)  # type: ignore[arg-type]
    assert summary.store == "s3://bucket/made" and len(summary.views) == 6 and summary.hidden_bytes > 0
    same("s3://bucket/made", small_store)
    want = tree(small_store)
    names = {k.removeprefix("made/data.zarr/") for k in s3.keys(server, "made/data.zarr/")}
    assert names == set(want)
    for name in names:  # the objects are the files, so that any Zarr library reads them
        assert s3.get(server, f"made/data.zarr/{name}") == want[name], name
    again = extract("s3://bucket/made", make_corpus(), loaded(bert), REQUEST)  # type: ignore[arg-type]
    assert (again.units_done_now, again.units) == (0, summary.units)
    assert not list((objects_module.cache_folder() / "writers").iterdir())
