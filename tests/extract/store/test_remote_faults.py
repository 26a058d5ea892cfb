"""An object store whose bytes arrive wrong, and a cache whose bytes rot: every read is right or an error, and nothing
has to be deleted by hand afterwards.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import s3
from click.testing import CliRunner

from stillhouse.data.errors import StillhouseError, StoreError, UsageError
from stillhouse.extract.commands.inspect import inspect
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.remote import block_cache as blocks_module
from stillhouse.extract.store.remote import client as objects_module
from stillhouse.extract.store.remote.cache import cache_folder
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus
from .test_remote import VIEWS, same

INT8 = Request("bert", [0, 2], ["alone", "both:4"], dtype="int8")


@pytest.fixture(scope="module")
def uploaded(server: int, small_store: Path) -> str:
    return s3.upload(server, small_store, "faults/small")


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory, server: int, bert: Path) -> tuple[str, Path]:
    root = tmp_path_factory.mktemp("scaled") / "s"
    extract(root, make_corpus(), loaded(bert), INT8)
    return s3.upload(server, root, "faults/scaled"), root


def now_and_then(rng: random.Random, share: float, *faults: str) -> s3.Fault:
    """Of the answers to GET, `share` have one of the faults."""
    return lambda method, path: rng.choice(faults) if method == "GET" and rng.random() < share else None


def all_of(store: Store, ids: list[str], views: list[View]) -> list[np.ndarray]:
    """Everything that commands read of a store: states, tokens, what was seen, norms, vocabulary, texts."""
    got = store.gather(ids, views)
    found = [*got.states.values(), *got.token_id.values(), *got.span.values()]
    found += [a for v in views for a in (store.input_hash(ids, v), *store.context_seen(ids, v), *store.norm(v))]
    name = views[0].teacher
    return [*found, *store.embedding(name), store.text_hash(ids), store.lengths(name), np.array(store.pieces(name))]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_every_read_is_right_or_an_error(
    proxy: s3.Proxy,
    uploaded: str,
    small_store: Path,
    scaled: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(objects_module.asyncio, "sleep", _no_pause(objects_module.asyncio.sleep))
    rng, wrong, errors, right = random.Random(seed), 0, 0, 0
    for url, root in ((uploaded, small_store), scaled):
        here = Store.open(root)
        views, ids = here.views, here.utterance_ids
        want = all_of(here, ids, views)
        for share in (0.05, 0.2, 0.6):
            proxy.random = random.Random(seed)
            proxy.fault = now_and_then(rng, share, "flip", "flip", "cut", "drop", "500", "503", "stale")
            for _ in range(3):
                try:
                    got = all_of(Store.open(url), ids, views)
                    wrong += not all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
                    right += 1
                except StillhouseError:
                    errors += 1
            proxy.fault = lambda method, path: None
            got = all_of(Store.open(url), ids, views)  # with what came before still in the cache
            assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
            if share == 0.2:
                shutil.rmtree(cache_folder())
    assert wrong == 0 and right and errors and proxy.harmed["flip"] > 20 and proxy.harmed["cut"] > 5


def _no_pause(sleep: Callable) -> Callable:
    return lambda seconds: sleep(0)


OBJECTS = [
    "store.json",
    "plan/0/plan.json",
    "commits/bert/alone/0.0.json",
    "bert/length/zarr.json",
    "bert/length/c/0",
    "bert/token_id/c/0",
    "bert/crc32c/c/0/1/0",
    "bert/input_hash/c/0/0",
    "bert/norm_mean/c/0/1/0",
    "bert/hidden/c/0/1/0/0",
    "utterances/id_bytes/c/0",
    "utterances/id_row/c/0",
]


@pytest.mark.parametrize("fault", ["flip", "cut"])
def test_an_object_that_always_arrives_wrong_is_named_and_never_stays(
    proxy: s3.Proxy, uploaded: str, small_store: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(objects_module.asyncio, "sleep", _no_pause(objects_module.asyncio.sleep))
    here = Store.open(small_store)
    ids, views = here.utterance_ids, VIEWS[:3]
    want = all_of(here, ids, views)
    for name in OBJECTS:
        proxy.fault = lambda method, path, name=name: fault if method == "GET" and path.endswith(name) else None
        try:
            got = all_of(Store.open(uploaded), ids, views)
            # Bits behind a shard's last utterance mean nothing.
            assert "hidden" in name and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
        except StoreError as e:
            assert re.search(f"s3://bucket/faults/small/(data.zarr/)?{name}", str(e)), e
        proxy.fault = lambda method, path: None
        got = all_of(Store.open(uploaded), ids, views)
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), name
        shutil.rmtree(cache_folder())


def harm_flip(data: bytes) -> bytes:
    at = len(data) // 3
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def harm_cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def harm_zero(data: bytes) -> bytes:
    return bytes(len(data))


@pytest.mark.parametrize("harm", [harm_cut, *(pytest.param(h, marks=pytest.mark.slow) for h in (harm_flip, harm_zero))])
def test_a_cache_that_rots_is_fetched_again_and_told_by_verify(
    proxy: s3.Proxy, uploaded: str, small_store: Path, harm: Callable[[bytes], bytes]
) -> None:
    """Also a commit record that is cut short, which made everything fail until the cache was deleted by hand."""
    here = Store.open(small_store)
    ids = here.utterance_ids
    want = all_of(here, ids, VIEWS)
    all_of(Store.open(uploaded), ids, VIEWS)
    files = [p for p in cache_folder().rglob("*") if p.is_file() and p.name != "lock" and "assembled" not in str(p)]
    assert len(files) > 60 and any(p.name == "0.0.json" for p in files)

    def rot() -> None:
        for path in files:
            if path.exists():
                path.write_bytes(harm(path.read_bytes()))

    rot()
    assert all(np.array_equal(a, b) for a, b in zip(all_of(Store.open(uploaded), ids, VIEWS), want, strict=True))
    rot()
    store = Store.open(uploaded)
    assert verify(store) == []
    renewed = list(store.paths.files.renewed)
    assert f"{uploaded}/commits/bert/alone/0.0.json" in renewed and any("/hidden/" in place for place in renewed)
    done = CliRunner().invoke(inspect, ["verify", uploaded, "--data", "--json"], catch_exceptions=False)
    assert done.exit_code == 0 and json.loads(done.stdout)["renewed"] == []
    rot()
    done = CliRunner().invoke(inspect, ["verify", uploaded, "--data"], catch_exceptions=False)
    assert done.exit_code == 0 and "the copy in the cache was damaged; it has been fetched again" in done.output


def test_what_arrived_wrong_before_there_were_checks_is_the_caches_fault(
    proxy: s3.Proxy, uploaded: str, small_store: Path
) -> None:
    """A block with the checksum of its wrong bytes, as it stays when nothing compares it with the store's checksums."""
    here = Store.open(small_store)
    ids = here.utterance_ids
    Store.open(uploaded).gather(ids, VIEWS)

    def spoil() -> None:
        for path in (cache_folder() / "blocks").rglob("*"):
            if path.is_file():
                data = harm_flip(path.read_bytes()[:-4])
                path.write_bytes(data + blocks_module.zlib.crc32(data).to_bytes(4, "little"))

    spoil()
    same(uploaded, small_store)
    spoil()
    store = Store.open(uploaded)
    assert verify(store) == [] and len(store.paths.files.renewed) == len(VIEWS)
    same(uploaded, small_store)


def test_what_is_damaged_in_the_bucket_is_told_from_the_cache(proxy: s3.Proxy, server: int, small_store: Path) -> None:
    url = s3.upload(server, small_store, "faults/bucket")
    ids = Store.open(small_store).utterance_ids
    all_of(Store.open(url), ids, VIEWS)
    names = ["data.zarr/bert/hidden/c/0/1/0/0", "data.zarr/bert/length/c/0", "commits/bert/alone/0.0.json"]
    whole = {name: s3.get(server, f"faults/bucket/{name}") for name in names}
    for name, data in whole.items():
        at = data.index(b'"rows"') + 1 if name.endswith(".json") else 70
        s3.put(server, f"faults/bucket/{name}", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        store = Store.open(url)
        try:
            found = verify(store)
        except StoreError as e:  # Without its commits nothing can be verified.
            assert name.startswith("commits") and f"{url}/{name}" in str(e)
            found = []
        assert not store.paths.files.renewed
        if "hidden" in name:
            assert [f.where.startswith("bert/alone/1 shard 0") and f"{url}/{name}" in f.what for f in found] == [True]
            with pytest.raises(StoreError, match=rf"still are when they are fetched again: {url}/{name} bytes 0-"):
                Store.open(url).gather(ids, VIEWS)
        if "length" in name:
            assert any("bert/length" in f.where for f in found)
        s3.put(server, f"faults/bucket/{name}", data)  # restored from a backup, under the cache that has the other
        assert verify(Store.open(url)) == []
        same(url, small_store)


@pytest.mark.parametrize(
    "fault,words,requests",
    [
        ("404 NoSuchBucket", "s3://bucket: there is no such bucket.*AWS_ENDPOINT_URL", 1),
        ("400 AuthorizationHeaderMalformed", "refuses: .*AuthorizationHeaderMalformed.*set AWS_REGION", 1),
        ("301 PermanentRedirect", "set AWS_REGION", 1),
        ("403 RequestTimeTooSkewed", "set the clock of this machine", 1),
        ("403 InvalidAccessKeyId", "InvalidAccessKeyId.*AWS_SECRET_ACCESS_KEY", 1),
        ("400 ExpiredToken", "ExpiredToken.*AWS_SECRET_ACCESS_KEY", 1),
        ("400 InvalidRequest", "refuses: .*InvalidRequest", 1),
        ("503 SlowDown", r"does not answer: .*SlowDown \(4 attempts\)", 4),
    ],
)
def test_words_for_what_no_second_attempt_changes(
    proxy: s3.Proxy, uploaded: str, monkeypatch: pytest.MonkeyPatch, fault: str, words: str, requests: int
) -> None:
    monkeypatch.setattr(objects_module.asyncio, "sleep", _no_pause(objects_module.asyncio.sleep))
    proxy.fault = lambda method, path: fault
    with pytest.raises(StoreError, match=words):
        Store.open(uploaded)
    assert proxy.counts.total() == requests


def test_words_for_settings(proxy: s3.Proxy, uploaded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is named before or with the first request, and what helps with it."""
    (tmp_path / "file").write_bytes(b"")
    cases = {
        "STILLHOUSE_CACHE_BYTES": (str(10**17), UsageError, "STILLHOUSE_CACHE_BYTES=1.* more than the disk"),
        "STILLHOUSE_REMOTE_ATTEMPTS": ("many", UsageError, "STILLHOUSE_REMOTE_ATTEMPTS=many"),
        "STILLHOUSE_CACHE": (str(tmp_path / "file"), StoreError, "the cache cannot be used: .*STILLHOUSE_CACHE"),
        "AWS_ENDPOINT_URL": ("localhost:9000", UsageError, "AWS_ENDPOINT_URL=localhost:9000"),
        "AWS_SECRET_ACCESS_KEY": (None, UsageError, "settings of the object store: .*SecretAccessKey"),
    }
    for name, (value, kind, words) in cases.items():
        objects_module.close_all()
        with monkeypatch.context() as patch:
            patch.delenv(name) if value is None else patch.setenv(name, value)
            with pytest.raises(kind, match=words):
                Store.open(uploaded)
    objects_module.close_all()
    with monkeypatch.context() as patch:  # Nothing listens there: two attempts, and not as many as a failure gets.
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.free_port()}")
        with pytest.raises(StoreError, match=r"cannot be reached: .*connect error \(2 attempts\).*AWS_ENDPOINT_URL"):
            Store.open(uploaded)
    objects_module.close_all()
    with monkeypatch.context() as patch:  # The service that a cloud's machine asks for its credentials.
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.setenv("AWS_METADATA_ENDPOINT", proxy.url)
        proxy.fault = lambda method, path: "404" if "/latest/" in path else None
        with pytest.raises(StoreError, match=r"there are no credentials .*AWS_SKIP_SIGNATURE"):
            Store.open(uploaded)


def test_a_full_disk_under_the_cache_is_not_the_object_stores_fault(
    proxy: s3.Proxy, uploaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    Store.open(uploaded)
    before = proxy.counts.total()
    monkeypatch.setattr("stillhouse.extract.store.remote.cache.os.replace", full)
    with pytest.raises(StoreError, match=r"the disk of the cache is full.*STILLHOUSE_CACHE"):
        Store.open(uploaded)
    assert proxy.counts.total() == before + 1
