"""Stores are copied to an object store and back, and cut and merged there. Other changes are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3
from click.testing import CliRunner

from stillhouse.cli import main
from stillhouse.data.errors import NoStoreError, StaleError, StoreError, UsageError
from stillhouse.data.manifest import Corpus
from stillhouse.extract.commands.store import store as store_commands
from stillhouse.extract.maintain.combine import copy, merge, subset
from stillhouse.extract.maintain.repair import repair
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk import layout
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus, sentences
from ..pipeline.test_crash import tree
from ..pipeline.test_refresh import edited

REQUEST = Request("t", [0, 2], ["alone", "past:4"], dtype="int8")
HALVES = Request("h", [1], ["both:4"])


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus([t for t in sentences() if t.isascii()][:30], per_session=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bert: Path, corpus: Corpus) -> Iterator[Path]:
    """int8 and float16, several shards, and a corpus that has changed since the first extraction."""
    root = tmp_path_factory.mktemp("bucketed") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MIN_SHARD_ROWS", 192)
        extract(root, corpus, loaded(bert), REQUEST)
        extract(root, corpus, loaded(bert), HALVES)
        now = edited(corpus, u3="something else entirely", u17=None)
        for request in (REQUEST, HALVES):
            extract(root, now, loaded(bert), request, refresh=True)
        yield root


def states(place: Path | str, ids: list[str] | None = None) -> dict[tuple[str, str], bytes]:
    """Return all that can be read from a store, with few requests."""
    found = {}
    store = Store.open(place, checksums=True)
    for view in store.views:
        mine = store.utterance_ids if ids is None else ids
        got = store.gather(mine, [view])
        ends = np.cumsum(got.lengths[view.teacher])
        parts = np.split(got.states[view], ends[:-1])
        found |= {(view.address, i): p.tobytes() for i, p in zip(mine, parts)}
    return found


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(store_commands, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.mark.slow
def test_there_and_back(proxy: s3.Proxy, server: int, made: Path, tmp_path: Path) -> None:
    """The objects equal the files of a copy on a disk, and a copy back equals the store."""
    code, told = run("cp", made, "s3://bucket/there", "--json")
    fact = json.loads(told)
    assert (code, fact["store"], fact["utterances"]) == (0, "s3://bucket/there", 29) and fact["bytes"] > 10_000
    copy(made, tmp_path / "disk")
    want = tree(tmp_path / "disk")
    assert {k.removeprefix("there/data.zarr/") for k in s3.keys(server, "there/data.zarr/")} == set(want)
    for name, data in want.items():
        assert s3.get(server, f"there/data.zarr/{name}") == data, name
    whole = states(made)
    assert states("s3://bucket/there") == whole and verify(Store.open("s3://bucket/there")) == []
    assert status("s3://bucket/there").complete  # type: ignore[arg-type]
    assert run("cp", "s3://bucket/there", tmp_path / "back", "--views", "t/*/2", "--views", "h/*/*")[0] == 0
    back = states(tmp_path / "back")
    assert (
        back == {k: v for k, v in whole.items() if not k[0].endswith("/0")}
        and verify(Store.open(tmp_path / "back")) == []
    )
    with pytest.raises(UsageError, match=r"s3://bucket/there: a store is there already"):
        copy(made, "s3://bucket/there")


@pytest.mark.slow
def test_cut_and_merged_there(proxy: s3.Proxy, made: Path, tmp_path: Path) -> None:
    """From URL to URL. A merge of float16 computes new norms."""
    whole = states(made)
    copy(made, "s3://bucket/source")
    ids = Store.open(made).utterance_ids
    for name, part in (("a", ids[:11]), ("b", ids[11:])):
        done = subset("s3://bucket/source", f"s3://bucket/{name}", part)
        assert done.utterances == len(part)
        assert states(f"s3://bucket/{name}") == {k: v for k, v in whole.items() if k[1] in part}
    merge("s3://bucket/a", "s3://bucket/b", "s3://bucket/ab")
    assert states("s3://bucket/ab") == whole and verify(Store.open("s3://bucket/ab")) == []
    merge("s3://bucket/a", "s3://bucket/b", tmp_path / "ab")
    assert states(tmp_path / "ab") == whole
    for view in Store.open(tmp_path / "ab").views:
        a, b = Store.open(tmp_path / "ab"), Store.open("s3://bucket/ab")
        assert all(np.array_equal(x, y) for x, y in zip(a.norm(view), b.norm(view)))


def test_an_interrupted_copy_is_resumed(
    proxy: s3.Proxy,
    server: int,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """There is no store before its last object. The same command completes it and puts no state twice."""
    monkeypatch.setenv("STILLHOUSE_REMOTE_ATTEMPTS", "1")
    copy(made, tmp_path / "disk")
    for stop in ("past-4/0.1.json", "past-4/1.1.npz", "norms", "store.json"):
        proxy.reset()
        proxy.fault = lambda method, path, stop=stop: "403" if method == "PUT" and stop in path else None
        with pytest.raises(StoreError, match="refuses"):
            copy(made, "s3://bucket/broken")
        with pytest.raises(NoStoreError, match="there is no store"):
            Store.open("s3://bucket/broken")
    proxy.reset()
    with pytest.raises(UsageError, match="another store has been begun there and never finished"):
        copy(made, "s3://bucket/broken", ["t/*/2"])
    copy(made, "s3://bucket/broken")
    assert not any("/hidden/c/" in k for k in proxy.put_keys)
    for name, data in tree(tmp_path / "disk").items():
        assert s3.get(server, f"broken/data.zarr/{name}") == data, name
    s3.put(server, "litter/data.zarr/zarr.json", b"{}")
    with pytest.raises(UsageError, match="1 objects are there, and no store"):
        copy(made, "s3://bucket/litter")


@pytest.mark.slow
def test_changes_that_are_refused_there(
    proxy: s3.Proxy,
    made: Path,
    bert: Path,
    corpus: Corpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each error says what to do instead, and doing that works."""
    url = "s3://bucket/kept"
    copy(made, url)
    now = edited(corpus, u3="something else entirely", u17=None, u9="yet another")
    for words in (["rm", url, "t/*/0"], ["gc", url]):
        with pytest.raises(SystemExit) as e:
            main(["store", *words])
        told = capsys.readouterr().err
        assert e.value.code == 2 and f"{url}: nothing in an object store can be deleted or moved" in told
        assert "stillhouse store cp, subset and merge" in told
    with pytest.raises(StaleError, match="u9"):
        extract(url, now, loaded(bert), REQUEST)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"{url}: the corpus has changed.*stillhouse store cp {url} FOLDER"):
        extract(url, now, loaded(bert), REQUEST, refresh=True)  # type: ignore[arg-type]
    copy(url, tmp_path / "d", ["t/*/*"])
    extract(tmp_path / "d", now, loaded(bert), REQUEST, refresh=True)
    copy(tmp_path / "d", "s3://bucket/new")
    assert extract("s3://bucket/new", now, loaded(bert), REQUEST).units_done_now == 0  # type: ignore[arg-type]
    assert states("s3://bucket/new") == states(tmp_path / "d")


@pytest.mark.slow
def test_int8_is_extended_and_repaired_there(
    proxy: s3.Proxy,
    server: int,
    made: Path,
    bert: Path,
    corpus: Corpus,
    tmp_path: Path,
) -> None:
    """Layers are added to a store that was copied there. Flipped bits of states and scales are found and repaired."""
    copy(made, "s3://bucket/grown", ["t/alone/*"])
    now, more = edited(corpus, u3="something else entirely", u17=None), Request("t", [0, 1, 2], ["alone"], dtype="int8")
    extract("s3://bucket/grown", now, loaded(bert), more)  # type: ignore[arg-type]
    copy(made, tmp_path / "disk", ["t/alone/*"])
    extract(tmp_path / "disk", now, loaded(bert), more)
    served = states(tmp_path / "disk")
    assert states("s3://bucket/grown") == served and verify(Store.open("s3://bucket/grown")) == []
    paths = Paths(Path("grown"))
    for path in (paths.hidden("t", 0, 1, 0), paths.scale("t", 0, 2, 1)):
        data = bytearray(s3.get(server, str(path)))
        data[7] ^= 64
        s3.put(server, str(path), bytes(data))
    found = [f.where.split(" utterance ")[0] for f in verify(Store.open("s3://bucket/grown"))]
    assert found == ["t/alone/2 shard 0", "t/alone/1 shard 1"] or len(found) == 2
    assert len(repair("s3://bucket/grown", loaded(bert), "t")) == 2  # type: ignore[arg-type]
    assert verify(Store.open("s3://bucket/grown")) == [] and states("s3://bucket/grown") == served
    shutil.rmtree(tmp_path / "cache")
    assert states("s3://bucket/grown") == served
