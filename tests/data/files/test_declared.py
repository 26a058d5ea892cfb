"""Files that declare far more than they hold are refused before memory is asked for."""

from __future__ import annotations

import io
import os
import resource
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from stillhouse.data.files.declared import read_hdf5, read_npy, read_npz


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def read(path: Path, name: str = "a") -> np.ndarray:
    if path.suffix == ".npy":
        return read_npy(path)
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return read_npz(path, archive, name)
    with h5py.File(path, "r") as file:
        return read_hdf5(file, name)


def lying_npy(folder: Path) -> Path:
    (folder / "a.npy").write_bytes(header((1 << 40, 384)))
    return folder / "a.npy"


def short_npy(folder: Path) -> Path:
    (folder / "a.npy").write_bytes(header((100, 4)) + bytes(1599))
    return folder / "a.npy"


def npz_of_zeros(folder: Path) -> Path:
    np.savez_compressed(folder / "a.npz", allow_pickle=False, a=np.zeros((1 << 20, 64), np.float32))
    return folder / "a.npz"


def npz_that_lies(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("a.npy", header((1 << 40, 384)) + bytes(100))
    return folder / "a.npz"


def unwritten_hdf5(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("a", (1 << 22, 64), "f4", chunks=(1024, 64), compression="gzip")
    return folder / "a.h5"


def hdf5_of_zeros(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        a = file.create_dataset("a", (1 << 20, 64), "f4", chunks=(1 << 16, 64), compression="gzip")
        zeros = zlib.compress(bytes(a.nbytes >> 4))  # HDF5 takes minutes to fill chunks that exceed its cache
        for i in range(16):
            a.id.write_direct_chunk((i << 16, 0), zeros)
    return folder / "a.h5"


def huge_chunk(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("a", (4, 64), "f4", chunks=(1 << 22, 64), maxshape=(None, 64), compression="gzip")
    return folder / "a.h5"


@pytest.mark.parametrize(
    "make", [lying_npy, short_npy, npz_of_zeros, npz_that_lies, unwritten_hdf5, hdf5_of_zeros, huge_chunk]
)
def test_what_declares_too_much_is_refused_before_it_is_expanded(make: Callable, tmp_path: Path) -> None:
    path = make(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=r"the array 'a(.npy)?' declares .* bytes, and the file has [\d,]+ bytes for it"
    ):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_other_files_are_not_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.arange(6.0)
    layout = h5py.VirtualLayout((6,), "f8")
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "x", (6,))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["link"] = h5py.ExternalLink("other.h5", "/x")
        file["up"] = h5py.ExternalLink("other.h5", "/")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", (6,), "f8", external=[(str(tmp_path / "other.h5"), 0, 48)])
        file.create_dataset("words", data=["a"], dtype=h5py.string_dtype())
        file["group/inner"] = np.arange(3.0)
    for name in ("link", "up/x", "virtual", "raw"):
        with pytest.raises(ValueError, match="other file"):
            read(tmp_path / "a.h5", name)
    with pytest.raises(ValueError, match="no array of numbers"):
        read(tmp_path / "a.h5", "words")
    with pytest.raises(KeyError):
        read(tmp_path / "a.h5", "group/inner/deeper")
    assert read(tmp_path / "a.h5", "/group/inner").tolist() == [0, 1, 2]


def test_sound_files_are_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float16)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    np.savez_compressed(tmp_path / "a.npz", allow_pickle=False, a=values)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=values, compression="gzip")
    for suffix in (".npy", ".npz", ".h5"):
        assert np.array_equal(read(tmp_path / f"a{suffix}"), values)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickled"):
        read_npy(tmp_path / "objects.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(OSError, match="no plain file"):
        read_npy(tmp_path / "pipe.npy")
