"""One bit of a store is flipped, wherever it lies: verify finds and names it, and repair extracts again what it can."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import run

from stillhouse.data.errors import StoreError
from stillhouse.extract.inspect.facts.store import verified
from stillhouse.extract.maintain.combine import copy
from stillhouse.extract.maintain.gc import collect_garbage
from stillhouse.extract.maintain.remove import remove_utterances
from stillhouse.extract.maintain.repair import repair_all
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk import layout
from stillhouse.extract.store.disk.checksums import checksum_error, with_checksum
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus

CHECKED = ("data.zarr", "plan", "commits", "store.json")
# Arrays that a repair computes again; all other files come from a backup.
REPAIRED = {"hidden", "code", "scale", "input_hash", "context_left", "context_right", "crc32c"}
REPAIRED |= {"norm_mean", "norm_std", "codebook"}


def turned(data: bytes, at: int, bit: int) -> bytes:
    """The same bytes with one bit flipped."""
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@pytest.fixture(scope="module", params=["float16", "int8", pytest.param("pq:4", marks=pytest.mark.slow)])
def sound(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and more, two contexts, two layers."""
    return built(tmp_path_factory.mktemp("sound") / "s", bert, request.param)


def built(root: Path, bert: Path, dtype: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MIN_SHARD_ROWS", 128)
        extract(root, make_corpus(), loaded(bert), Request("bert", [0, 2], ["alone", "both:4"], dtype=dtype))
    return root


def files(root: Path) -> list[Path]:
    return [p for p in sorted(root.rglob("*")) if p.is_file() and p.relative_to(root).parts[0] in CHECKED]


def served(root: Path) -> list[bytes]:
    store = Store.open(root, checksums=True)
    g = store.gather(store.utterance_ids, store.views)
    return [*(s.tobytes() for s in g.states.values()), g.token_id["bert"].tobytes(), g.span["bert"].tobytes()]


def flips(root: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """(file, byte, bit): every file is as likely as any other, however small it is."""
    chance, every = random.Random(seed), [p for p in files(root) if p.stat().st_size]
    for _ in range(count):
        path = chance.choice(every)
        yield path, chance.randrange(path.stat().st_size), chance.randrange(8)


def same_value(path: Path, a: bytes, b: bytes) -> bool:
    """Whether two JSON files say the same, as "\\u00e9" and "\\u00E9" do: that is harmless."""
    try:
        return path.suffix == ".json" and json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize("count", [10, pytest.param(1_000, marks=pytest.mark.slow)])
def test_a_bit_anywhere(sound: Path, tmp_path: Path, count: int) -> None:
    root = tmp_path / "s"
    shutil.copytree(sound, root)
    before = served(root)
    for path, at, bit in flips(root, count, seed=count):
        data = path.read_bytes()
        path.write_bytes(turned(data, at, bit))
        where = f"{path.relative_to(root)} byte {at} bit {bit}"
        found = run("inspect", "verify", root, "--data")
        if found.exit_code == 0:
            assert same_value(path, data, path.read_bytes()), where
            path.write_bytes(data)
            continue
        assert found.exit_code == 1 and ("--repair" in found.output or "backup" in found.output), where
        repaired = run("inspect", "verify", root, "--data", "--repair", "--device", "cpu")
        if REPAIRED & set(path.parts) and path.name != "zarr.json":
            assert repaired.exit_code == 0, (where, repaired.output)
        else:
            assert repaired.exit_code == 1 and path.read_bytes() == turned(data, at, bit), where
            path.write_bytes(data)
            assert run("inspect", "verify", root, "--data").exit_code == 0, where
    assert served(root) == before


@pytest.mark.parametrize(
    "array, says",
    [
        ("bert/token_id", "bert/token_id utterance u"),
        ("bert/span", "bert/span utterance u"),
        ("bert/length", "bert/length utterance u"),
        ("bert/input_hash", "bert/alone shard 0 input_hash"),
        ("bert/crc32c", "bert/alone/0 shard 0 crc32c"),
        ("bert/norm_mean", "bert/alone/0 norm_mean"),
        ("bert/embedding", "bert/embedding row 0"),
        ("utterances/text_hash", "utterances/text_hash utterance u"),
    ],
)
def test_what_is_named(sound: Path, tmp_path: Path, array: str, says: str) -> None:
    """A bit whose value stays plausible; without reading any state."""
    root = tmp_path / "s"
    shutil.copytree(sound, root)
    path = next(p for p in files(root) if f"/{array}/c/" in str(p))
    data = path.read_bytes()
    path.write_bytes(turned(data, 0, 0))
    found = [f.where for f in verify(Store.open(root), data=0.0)]
    assert len(found) == 1 and found[0].startswith(says), found


def test_an_index_that_cannot_be_read(sound: Path, tmp_path: Path) -> None:
    """Offsets that lead out of the table: nothing can be looked up, and verify still names the damage."""
    root = tmp_path / "s"
    shutil.copytree(sound, root)
    path = root / "data.zarr/utterances/id_offset/c/0"
    data = path.read_bytes()
    path.write_bytes(turned(data, 19, 5))
    found = run("inspect", "verify", root)
    assert found.exit_code == 1 and "utterances/id_offset" in found.output and "backup" in found.output, found.exception


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_states_of_every_dtype(bert: Path, tmp_path: Path, dtype: str) -> None:
    root = built(tmp_path / "s", bert, dtype)
    before, path = served(root), root / "data.zarr/bert/hidden/c/0/1/0/0"
    path.write_bytes(turned(path.read_bytes(), 40, 6))
    found = verify(Store.open(root))
    assert len(found) == 1 and found[0].where.startswith("bert/alone/2 shard 0 utterance u")
    assert [m.unit for m in repair_all(root, {}, "cpu")] == ["bert/alone shard 0"]
    assert verify(Store.open(root)) == [] and served(root) == before


def test_what_repair_computes_again(bert: Path, tmp_path: Path) -> None:
    """Norms are worked out again; tokens can't be, and are left as they are."""
    root = built(tmp_path / "s", bert, "float16")
    norms, tokens = root / "data.zarr/bert/norm_std/c/1/0/0", root / "data.zarr/bert/token_id/c/0"
    data, size = norms.read_bytes(), tokens.stat().st_size
    norms.write_bytes(bytes(len(data)))
    assert [(m.unit, m.how) for m in repair_all(root, {}, "cpu")] == [("bert/both:4/0 norms", "worked out again")]
    assert norms.read_bytes() == data and verify(Store.open(root)) == []
    tokens.write_bytes(bytes(size))
    assert repair_all(root, {}, "cpu") == [] and tokens.read_bytes() == bytes(size)
    found = verify(Store.open(root))
    assert found and {f.remedy for f in found} == {"restore the file from a backup, or extract into a new store"}


def test_what_is_damaged_is_not_copied(bert: Path, tmp_path: Path) -> None:
    """Or its copy would have a checksum that is right."""
    root = built(tmp_path / "s", bert, "float16")
    path = root / "data.zarr/bert/token_id/c/0"
    path.write_bytes(turned(path.read_bytes(), 0, 0))
    for command in (
        lambda: copy(root, tmp_path / "out"),
        lambda: collect_garbage(root),
        lambda: remove_utterances(root, ["u1"]),
    ):
        with pytest.raises(StoreError, match="bert/token_id utterance u"):
            command()
    assert not (tmp_path / "out").exists()


def test_rows_that_come_later_are_checked(bert: Path, tmp_path: Path) -> None:
    root = built(tmp_path / "s", bert, "float16")
    corpus = make_corpus()
    corpus.utterances[4] = corpus.utterances[4].model_copy(update={"text": "we saw the sea"})
    extract(root, corpus, loaded(bert), Request("bert", [0, 2], ["alone", "both:4"]), refresh=True)
    new = int(Store.open(root).rows(["u4"])[0])
    collect_garbage(root)
    store = Store.open(root)
    assert verify(store) == [] and verified(store).unchecked == [] and new >= 30
    start = int(store._teacher_rows("bert").start[store.rows(["u4"])[0]])
    shard, row = divmod(start, store.teacher("bert").shard_rows)
    path = root / f"data.zarr/bert/token_id/c/{shard}"
    path.write_bytes(turned(path.read_bytes(), 4 * row, 1))
    (damage,) = verify(Store.open(root))
    assert damage.where.startswith("bert/token_id utterance") and "u4" in damage.where


@pytest.mark.parametrize("name", ["plan.json", "zarr.json"])
def test_every_bit_of_a_record(name: str) -> None:
    """Whatever bit of it turns: it says the same, or it is found."""
    value = {"zarr_format": 3, "attributes": {"a": [1, 2.5, "é\n"], "b": None}, "more": "crc32c"}
    data = with_checksum(value, name)
    for at in range(len(data)):
        for bit in range(8):
            other = turned(data, at, bit)
            try:
                found = checksum_error(json.loads(other), name) is not None
            except ValueError:
                found = True
            assert found or same_value(Path(name), data, other), other


def test_a_chunk_that_is_missing_is_never_read_as_zeros(sound: Path, tmp_path: Path) -> None:
    """Every file of an array that the plan or a commit names: what is read without it is the same, or an error."""
    root = tmp_path / "s"
    shutil.copytree(sound, root)

    def everything() -> list[bytes]:
        store = Store.open(root)
        found = [store.lengths("bert"), store.text_hash(store.utterance_ids), *store.embedding("bert")]
        for view in store.views:
            found += [*store.inputs_seen(view), *store.norm(view)]
        return [*served(root), *(a.tobytes() for a in found), str(store.pieces("bert")).encode()]

    want, named = everything(), set()
    for path in files(root):
        if "c" not in path.relative_to(root).parts:
            continue
        data = path.read_bytes()
        path.unlink()
        try:
            assert everything() == want, path
        except StoreError:
            named.add(path.relative_to(root / "data.zarr").parts[1])
            assert verify(Store.open(root), data=0.1), path
        path.write_bytes(data)
    assert {"start", "length", "input_hash", "context_left", "norm_mean", "id_hash", "text_hash", "embedding"} <= named
