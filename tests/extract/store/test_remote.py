"""Stores in an object store: read over S3's protocol, by every command, from a server on loopback made to fail."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import crashes
import numpy as np
import pytest
import s3
import soundfile
import torch
from click.testing import CliRunner

from stillhouse.data.errors import NoStoreError, StoreError, UsageError
from stillhouse.data.features.compute import compute_features
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.data.units import train_units
from stillhouse.extract.commands.inspect import inspect
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.disk.locks import exclusive_access
from stillhouse.extract.store.remote import block_cache as blocks_module
from stillhouse.extract.store.remote import cache as cache_module
from stillhouse.extract.store.remote import client as objects_module
from stillhouse.extract.store.remote.cache import evict
from stillhouse.extract.store.remote.files import RemoteFiles
from stillhouse.extract.store.verify.verify import verify
from stillhouse.train.commands.train import train

from ..conftest import loaded

VIEWS = [View("bert", c, k) for c in ("alone", "both:4") for k in (0, 1, 2)]
REQUEST = Request("bert", [0, 1, 2], ["alone", "both:4"])


@pytest.fixture(scope="module")
def uploaded(server: int, small_store: Path) -> str:
    return s3.upload(server, small_store, "up/small")


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


def once(fault: str, *methods: str) -> s3.Fault:
    """Every object's first request fails."""
    seen: set[tuple[str, str]] = set()

    def harm(method: str, path: str) -> str | None:
        if method in methods and (method, path) not in seen:
            seen.add((method, path))
            return fault
        return None

    return harm


@pytest.mark.parametrize("fault", ["500", "drop", pytest.param("slow", marks=pytest.mark.slow)])
def test_failing_reads_are_tried_again(
    proxy: s3.Proxy, uploaded: str, small_store: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_REMOTE_TIMEOUT_S", "1")
    proxy.fault = once(fault, "GET")
    there, here = Store.open(uploaded), Store.open(small_store)
    ids = here.utterance_ids
    assert np.array_equal(there.gather(ids, VIEWS[4:5]).states[VIEWS[4]], here.gather(ids, VIEWS[4:5]).states[VIEWS[4]])
    assert proxy.harmed[fault] >= 10


@pytest.mark.parametrize(
    "fault,words",
    [
        (
            "500",
            r"s3://bucket/up/small/store.json: the object store does not answer: .*500.*\(4 attempts\).*AWS_ENDPOINT",
        ),
        ("403", r"s3://bucket/up/small/store.json: the object store refuses: .*403.*AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_an_object_store_that_stays_away_is_told(proxy: s3.Proxy, uploaded: str, fault: str, words: str) -> None:
    proxy.fault = lambda method, path: fault
    with pytest.raises(StoreError, match=words):
        Store.open(uploaded)
    proxy.fault = lambda method, path: None
    store = Store.open(uploaded)
    proxy.fault = lambda method, path: fault if "hidden" in path else None
    with pytest.raises(StoreError, match="hidden"):
        store.gather(store.utterance_ids[:2], VIEWS[:1])
    proxy.fault = lambda method, path: None
    assert len(store.gather(store.utterance_ids[:2], VIEWS[:1]).states) == 1  # it goes on


def test_urls_that_name_no_store(proxy: s3.Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoStoreError, match=r"s3://bucket/nothing: there is no store"):
        Store.open("s3://bucket/nothing")
    with pytest.raises(UsageError, match="s3://BUCKET/PREFIX"):
        Store.open("s3://bucket")
    monkeypatch.setattr(objects_module, "find_spec", lambda name: None)
    objects_module.close_all()
    with pytest.raises(UsageError, match=r"pip install 'stillhouse\[cloud\]'"):
        Store.open("s3://bucket/up/small")


class Read(torch.utils.data.Dataset):
    """What a DataLoader's workers do with a store."""

    def __init__(self, store: Store, ids: list[str]) -> None:
        self.store, self.ids = store, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> bytes:
        return self.store.gather([self.ids[i]], VIEWS[1:2]).states[VIEWS[1]].tobytes()


@pytest.mark.slow
def test_workers_of_a_dataloader_that_start_afresh_read(proxy: s3.Proxy, uploaded: str) -> None:
    store = Store.open(uploaded)
    ids = store.utterance_ids[:6]
    want = [Read(store, ids)[i] for i in range(6)]
    loader = torch.utils.data.DataLoader(
        Read(store, ids), batch_size=None, num_workers=2, multiprocessing_context="spawn", timeout=120
    )
    assert list(loader) == want
    assert pickle.loads(pickle.dumps(store)).path == store.path


def test_a_process_that_was_forked_is_refused_by_name(proxy: s3.Proxy, uploaded: str) -> None:
    """The threads of the client do not survive a fork, so a read there would wait for ever."""
    store = Store.open(uploaded)
    (expected,) = store.gather(["u1"], VIEWS[:1]).states.values()
    end, other_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Store.open(uploaded)
            said = "it was read"
        except StoreError as e:
            said = str(e)
        os.write(other_end, said.encode())
        os._exit(0)
    os.close(other_end)
    assert os.waitpid(child, 0)[1] == 0
    said = os.read(end, 10_000).decode()
    os.close(end)
    assert (
        said.startswith("s3://bucket/up/small: this process was forked") and 'multiprocessing_context="spawn"' in said
    )
    assert np.array_equal(store.gather(["u1"], VIEWS[:1]).states[VIEWS[0]], expected)  # The parent reads on.


def test_a_damaged_block_is_fetched_again(proxy: s3.Proxy, uploaded: str, small_store: Path) -> None:
    store = Store.open(uploaded)
    store.gather(store.utterance_ids, VIEWS)
    blocks = [p for p in (cache_module.cache_folder() / "blocks").rglob("*") if p.is_file()]
    assert len(blocks) == 6 and not any(p.name.endswith(".tmp") for p in blocks)
    for path in blocks:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    same(uploaded, small_store)


def test_a_shard_that_was_replaced_is_told(proxy: s3.Proxy, server: int, small_store: Path) -> None:
    key = "re/data.zarr/bert/hidden/c/0/0/0/0"
    for path in small_store.rglob("*"):
        if path.is_file():
            s3.put(server, f"re/{path.relative_to(small_store)}", path.read_bytes())
    store = Store.open("s3://bucket/re")
    blocks = store.paths.files.blocks(store.paths.hidden("bert", 0, 0, 0))
    assert blocks is not None
    data = s3.get(server, key)
    s3.put(server, key, data[:100] + bytes(len(data) - 100))
    with pytest.raises(StoreError, match="replaced while it was read; open the store again"):
        blocks.read(memoryview(bytearray(10)), 0)


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    """What was used longest ago goes first; what a writer is making stays."""
    for i in range(20):
        path = tmp_path / "blocks" / f"{i % 3}" / str(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
        os.utime(path, (i, i))
    own = tmp_path / "writers" / "w" / "file"
    own.parent.mkdir(parents=True)
    own.write_bytes(bytes(9000))
    evict(tmp_path, 10_000)
    left = sorted(int(p.name) for p in (tmp_path / "blocks").rglob("*") if p.is_file())
    assert left == list(range(11, 20)) and own.exists()
    evict(tmp_path, 10_000)
    assert len(list((tmp_path / "blocks").rglob("*"))) == 3 + 9


def test_files_of_stores_in_use_are_not_removed(tmp_path: Path) -> None:
    """Blocks have a quarter of the limit in any case; files of stores that are not in use go by their age."""
    for i in range(20):
        for path in (tmp_path / folder / str(i) for folder in ("blocks", "mirrors", "mirrors/used")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(1000))
            if path.parent.name != "used":
                os.utime(path, (i, i))
    evict(tmp_path, 22_000)
    assert len(list((tmp_path / "mirrors" / "used").iterdir())) == 20
    left = [int(p.name) for p in (*(tmp_path / "blocks").iterdir(), *(tmp_path / "mirrors").glob("[0-9]*"))]
    assert sorted(left) == [18, 18, 19, 19]


def test_what_another_process_removes_from_the_cache_is_never_missed(
    proxy: s3.Proxy, uploaded: str, small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process with the same cache removes all that it may, between each look for a file and its use."""
    fetch = RemoteFiles.fetch

    def fetch_and_lose(self: RemoteFiles, paths: Iterable[Path]) -> None:
        fetch(self, paths)
        evict(cache_module.cache_folder(), 1000)

    monkeypatch.setattr(RemoteFiles, "fetch", fetch_and_lose)
    for _ in range(2):
        same(uploaded, small_store)
        for path in cache_module.cache_folder().rglob("*"):
            os.utime(path, (1, 1))
    assert verify(store := Store.open(uploaded)) == [] and store.paths.files.renewed == []


READER = """
import sys
sys.path.insert(0, sys.argv[1])
import crashes
import numpy as np
from stillhouse.extract.store import Store
from stillhouse.extract.store.remote import block_cache, client

url, root, moment = sys.argv[2:]
block_cache.BLOCK_BYTES = 4096
if moment:
    crashes.signal_at(moment)
else:
    client.cache_limit_bytes = lambda: 30_000
here = Store.open(root)
ids = here.utterance_ids
for _ in range(1 if moment else 3):
    there = Store.open(url)
    assert there.views == here.views
    a, b = there.gather(ids, here.views), here.gather(ids, here.views)
    assert all(np.array_equal(a.states[v], b.states[v]) for v in here.views)
    assert all(np.array_equal(there.input_hash(ids, v), here.input_hash(ids, v)) for v in here.views)
"""


def start_reader(url: str, root: Path, moment: str = "") -> subprocess.Popen:
    """A process that compares all states; killed at a moment, or with a cache that is too small."""
    command = [sys.executable, "-c", READER, str(Path(crashes.__file__).parent), url, str(root), moment]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_a_cache_that_is_too_small(proxy: s3.Proxy, uploaded: str, small_store: Path) -> None:
    readers = [start_reader(uploaded, small_store) for _ in range(2)]
    said = [reader.communicate()[1] for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0], said


@pytest.mark.parametrize("kind", ["block", "object"])
def test_readers_that_are_killed_leave_a_cache_that_is_right(
    proxy: s3.Proxy, uploaded: str, small_store: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Killed before and after a block or a whole object gets its name; the next reader uses what is there."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 4096)
    for moment in (f"{kind}_named:2", f"{kind}_kept:3"):
        reader = start_reader(uploaded, small_store, moment)
        said = reader.communicate()[1]
        assert reader.returncode == -signal.SIGKILL, said
        assert "kept" in moment or list(cache_module.cache_folder().rglob("*.tmp"))
        store = Store.open(uploaded)
        assert store.views == VIEWS and verify(store) == [] and store.paths.files.renewed == []
        same(uploaded, small_store)
        shutil.rmtree(cache_module.cache_folder())


@pytest.mark.slow
def test_reading_goes_on_while_the_cache_is_too_small(
    proxy: s3.Proxy, uploaded: str, small_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(objects_module, "cache_limit_bytes", lambda: 30_000)
    for _ in range(3):
        same(uploaded, small_store)
    total = sum(p.stat().st_size for p in (cache_module.cache_folder() / "blocks").rglob("*") if p.is_file())
    assert total <= 31_000


def test_what_changes_a_store_on_a_disk_is_refused(proxy: s3.Proxy, uploaded: str) -> None:
    store = Store.open(uploaded)
    words = "s3://bucket/up/small: this command changes only stores on a disk; stillhouse store cp"
    with pytest.raises(StoreError, match=words), exclusive_access(store.paths):
        pass


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["ls", "--utterances"],
        ["show", "u1"],
        ["stats", "--full"],
        ["verify", "--data"],
        ["tree"],
        ["similarity"],
    ],
)
def test_inspect_takes_urls(proxy: s3.Proxy, uploaded: str, small_store: Path, command: list[str]) -> None:
    def facts(store: str) -> object:
        done = CliRunner().invoke(inspect, [command[0], store, *command[1:], "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def strip(value: object) -> object:
        """Without what the place of the store and its folders for writers make different."""
        if isinstance(value, dict):
            own = {"path", "store", "bytes", "files", "other_bytes", "seconds", "nodes"}
            return {k: strip(v) for k, v in value.items() if k not in own}
        return [strip(v) for v in value] if isinstance(value, list) else value

    assert strip(facts(uploaded)) == strip(facts(str(small_store)))


def test_status_and_training_take_urls(proxy: s3.Proxy, uploaded: str, small_store: Path) -> None:
    from stillhouse.extract.commands.extract import extract as command
    from stillhouse.train.config.sections import TransferSection

    arguments = [str(small_store), uploaded, "--status", "--json"]
    state = json.loads(CliRunner().invoke(command, arguments, catch_exceptions=False).stdout)
    assert state["complete"] and [c["missing"] for c in state["contexts"]] == [0, 0]
    section = TransferSection(stores=[uploaded], views=["bert/*/last"])  # type: ignore[list-item]
    store = Store.open(section.stores[0])
    assert store.resolve(section.views) == [VIEWS[2], VIEWS[5]] and store.shards(["u1", "nobody"]).tolist() == [0, -1]


def test_training_from_a_bucket_is_training_from_a_disk(proxy: s3.Proxy, bert: Path, tmp_path: Path) -> None:
    """`stillhouse train`, with the store at a URL and then on this disk: the losses of all steps are the same."""
    texts = ["we", "it's done", "she would not wear it there", "a knight rode"] * 2
    rng = np.random.default_rng(0)
    utterances = []
    for i, text in enumerate(texts):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(32_000), 16_000)
        split = "dev" if i == len(texts) - 1 else "train"
        utterances.append(Utterance(id=f"u{i}", text=text, audio=f"{i}.wav", split=split, session=f"s{i // 4}"))
    write_manifest(tmp_path / "corpus.jsonl", utterances)
    corpus = read_manifest(tmp_path / "corpus.jsonl")
    compute_features(corpus, tmp_path / "features.h5", speeds=(1.0,), workers=0)
    train_units(texts, "characters").save(tmp_path / "units")
    for store in ("s3://bucket/trained", tmp_path / "store.zarr"):
        extract(store, corpus, loaded(bert), REQUEST)  # type: ignore[arg-type]
    (tmp_path / "run.toml").write_text(f"""
[data]
corpus = "{tmp_path}/corpus.jsonl"
features = "{tmp_path}/features.h5"
units = "{tmp_path}/units"
train = "train"
dev = "dev"
speeds = [1.0]
batch_frames = 600
[model]
dim = 32
layers = 1
heads = 2
inner = 32
kernel = 7
predictor_dim = 16
joint_dim = 32
[optim]
steps = 4
warmup_steps = 2
[transfer]
views = ["bert/*/1,2"]
[run]
device = "cpu"
precision = "float32"
threads = 1
log_every = 1
eval_every = 4
checkpoint_every = 4
""")
    losses = []
    for name, store in (("url", "s3://bucket/trained"), ("disk", str(tmp_path / "store.zarr"))):
        before = proxy.counts["GET"]
        arguments = [str(tmp_path / "run.toml"), "--set", f"transfer.stores={store}", "--out", str(tmp_path / name)]
        done = CliRunner().invoke(train, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert (proxy.counts["GET"] > before) == (name == "url")
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["kind"] == "train"]
        losses.append([{k: v for k, v in s.items() if "loss" in k or "transfer" in k or k == "rnnt"} for s in steps])
    views = {f"transfer/bert/{context}/{layer}" for context in ("alone", "both:4") for layer in (1, 2)}
    assert len(losses[0]) == 4 and views <= set(losses[0][0]) and losses[0] == losses[1]
