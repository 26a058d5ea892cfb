"""The bytes of the format, worked by hand, and zarr-python as the judge of them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from pytest import MonkeyPatch

from stillhouse.data.errors import NoStoreError, StoreError, UsageError
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.disk import durable as files
from stillhouse.extract.store.disk.layout import (
    check_teacher_name,
    dtype_of,
    footer,
    identity_rows,
    shard_bytes,
    shard_rows,
    to_float32,
)
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.format.arrays import ArrayWriter, RawArray
from stillhouse.extract.store.writer import encode, is_finite


def test_footer_by_hand() -> None:
    """A shard of 192 rows of 8 bytes, 70 of them used: two chunks of 512 bytes, the third missing."""
    none = 2**64 - 1
    index = struct.pack("<6Q", 0, 512, 512, 512, none, none)
    assert footer(70, 192, 8) == index + struct.pack("<I", google_crc32c.value(index))
    assert shard_bytes(70, 192, 8) == 2 * 512 + 3 * 16 + 4
    assert identity_rows(footer(70, 192, 8), 192, 8) == 128


def test_a_damaged_footer_is_an_error_and_a_foreign_one_is_not() -> None:
    data = bytearray(footer(70, 192, 8))
    data[3] ^= 1
    with pytest.raises(StoreError, match="damaged"):
        identity_rows(bytes(data), 192, 8)
    index = struct.pack("<6Q", 512, 512, 0, 512, 2**64 - 1, 2**64 - 1)  # chunks the other way round
    assert identity_rows(index + struct.pack("<I", google_crc32c.value(index)), 192, 8) is None


def test_shard_rows() -> None:
    f16 = dtype_of("float16")
    assert shard_rows(1_000, 50, 384, f16) == 2_048  # the floor
    assert shard_rows(1_600_000, 50, 384, f16) == 100_032  # a sixteenth, to a multiple of 64
    assert shard_rows(10**9, 50, 384, f16) == 174_720  # 128 MiB
    assert shard_rows(1_000, 5_000, 384, f16) == 5_056  # the longest utterance
    with pytest.raises(StoreError, match="does not fit"):
        shard_rows(10**6, 200_000, 384, f16)


def test_bfloat16_as_torch() -> None:
    import torch

    values = np.concatenate([np.random.default_rng(0).normal(size=2000) * 10.0 ** np.arange(2000).clip(0, 30), [0.0]])
    values = values.astype(np.float32)[:, None]
    want = torch.from_numpy(values).to(torch.bfloat16)
    got = encode(values, dtype_of("bfloat16"))
    assert np.array_equal(got, want.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(to_float32(got, "bfloat16"), want.float().numpy())
    assert not is_finite(encode(np.array([[np.inf]], np.float32), dtype_of("bfloat16")), dtype_of("bfloat16"))
    assert np.isnan(to_float32(dtype_of("bfloat16").fill_rows(1, 1), "bfloat16")).all()


def test_zarr_reads_every_array_the_same(small_store: Path) -> None:
    group = zarr.open_group(small_store / "data.zarr", mode="r")
    names = [n for n, a in group.members(max_depth=None) if isinstance(a, zarr.Array)]
    assert {"bert/hidden", "bert/token_id", "bert/crc32c", "utterances/id_hash"} <= set(names)
    for name in names:
        if not name.endswith("hidden"):
            raw = RawArray(Paths(small_store), *name.split("/"))
            lead = [()] if raw.chunks[0] != 1 or raw.shape == raw.chunks else [(i,) for i in range(raw.shape[0])]
            for index in lead:
                if len(index) == 1 and len(raw.chunks) == 3:
                    for j in range(raw.shape[1]):
                        assert np.array_equal(raw.read(*index, j), group[name][index[0], j])
                else:
                    assert np.array_equal(raw.read(*index), group[name][index] if index else group[name][:])


@pytest.mark.parametrize("how", ["range", "grown"])
def test_a_file_that_is_being_made_is_never_found_short(how: str, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """At every call that a writer makes of the system, another reads the array: nothing, or what is written."""
    paths, values = Paths(tmp_path), np.arange(1, 41, dtype=np.int32)
    path, writer = paths.data / "length", ArrayWriter(paths)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [16]}}
    meta = {"shape": [40], "chunk_grid": grid, "data_type": "int32", "codecs": codecs, "fill_value": 0}
    writer.create(("length",), meta)
    seen: list[list[int]] = []

    def watched(name: str) -> None:
        true = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            before = RawArray(paths, "length").read().tolist()
            done = true(*arguments, **named)
            seen.extend([before, RawArray(paths, "length").read().tolist()])
            return done

        monkeypatch.setattr(files.os, name, call)

    for name in ("posix_fallocate", "fsync", "link", "pwrite", "unlink", "close"):
        watched(name)
    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", lambda p, dtype, mode, shape: np.frombuffer(p.read_bytes(), dtype).reshape(shape))
        for first in (0, 10, 20, 30):
            if how == "range":
                RawArray(paths, "length").write_rows(values[first : first + 10], first=first)
            else:
                writer.append(("length",), values[first : first + 10], first)
    monkeypatch.undo()
    assert len(seen) > 20 and all(not found or found == n for line in seen for n, found in enumerate(line, 1))
    assert np.array_equal(RawArray(paths, "length").read(), values)
    assert sorted(p.name for p in (path / "c").iterdir()) == ["0", "1", "2"]


def test_two_that_make_a_file_at_once_make_one(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    true, met = os.link, threading.Barrier(2)

    def link(*arguments: Any) -> None:
        met.wait(10)
        true(*arguments)

    monkeypatch.setattr(files.os, "link", link)
    path = tmp_path / "c" / "0"

    def write(at: int) -> None:
        fd = files.open_sized(path, 8)
        os.pwrite(fd, b"abcd", at)
        os.close(fd)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, (0, 4)))
    assert path.read_bytes() == b"abcdabcd" and [p.name for p in path.parent.iterdir()] == ["0"]


def test_rows_between_utterances_read_as_nan(small_store: Path) -> None:
    store = Store.open(small_store)
    array = zarr.open_array(small_store / "data.zarr" / "bert" / "hidden", mode="r")
    filled = np.zeros(array.shape[2], dtype=bool)
    rows = store._teacher_rows("bert")
    for start, n in zip(rows.start, rows.length):
        filled[start : start + n] = True
    everything = array[:]
    assert np.isfinite(everything[:, :, filled]).all()
    assert np.isnan(everything[:, :, ~filled]).all() and (~filled).any()


def test_xarray_names(small_store: Path) -> None:
    meta = json.loads((small_store / "data.zarr" / "bert" / "hidden" / "zarr.json").read_text())
    assert meta["dimension_names"] == ["context", "layer", "token", "dimension"]
    assert meta["fill_value"] == "NaN"


def test_someones_compressed_copy_still_reads(small_store: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(small_store, tmp_path / "copy")
    path = copy / "data.zarr" / "bert" / "hidden"
    old = zarr.open_array(path, mode="r")
    values, attributes = old[:], dict(old.attrs)
    shutil.rmtree(path)
    shape = values.shape
    new = zarr.create_array(
        path, shape=shape, dtype="float16", fill_value=float("nan"), compressors=[zarr.codecs.ZstdCodec()],
        shards=old.shards, chunks=old.chunks, attributes=attributes,
    )  # fmt: skip
    new[:] = values
    before, after = Store.open(small_store), Store.open(copy)
    ids, view = before.utterance_ids[3:9], View("bert", "both:4", 2)
    assert np.array_equal(before.gather(ids, [view]).states[view], after.gather(ids, [view]).states[view])


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "utterances", "x" * 65])
def test_names_that_are_no_teachers(name: str) -> None:
    with pytest.raises(UsageError):
        check_teacher_name(name)


def test_no_store(tmp_path: Path, small_store: Path) -> None:
    with pytest.raises(NoStoreError, match="no store"):
        Store.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": "stillhouse-store", "version": 99}')
    with pytest.raises(StoreError, match="version 99"):
        Store.open(tmp_path)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(NoStoreError, match="not a store"):
        Store.open(tmp_path)


def test_reading_imports_neither_torch_nor_zarr(small_store: Path) -> None:
    code = (
        "import sys; from stillhouse.extract.store import Store\n"
        f"s = Store.open({str(small_store)!r}); s.gather(s.utterance_ids[:3], s.views)\n"
        "bad = {'torch', 'transformers', 'zarr', 'click'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
