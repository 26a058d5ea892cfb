"""What arrays in files declare, compared with the bytes that the file has for them, before memory is asked for.

Guarantees: no array is expanded beyond `FREE_BYTES` or `MOST_EXPANSION` times its bytes in the file, whatever its
header declares, and nothing but the file that is named is read.
Try: `pytest tests/data/files/test_declared.py`.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .atomic import open_plain

FREE_BYTES = 64 << 20  # an array of this size needs no bytes in the file
MOST_EXPANSION = 100  # real states shrink by a tenth, and zeros a thousand times


def check_declared(name: str, shape: Sequence[int], dtype: np.dtype, held: int, packed: bool) -> None:
    """Raise ValueError where an array declares more bytes than `held` bytes of its file can be.

    Arguments:
        name: the array, for the error.
        held: bytes that the file has for it.
        packed: whether they are compressed, or may be left out where they are the fill value.
    """
    declared = math.prod(int(n) for n in shape) * dtype.itemsize
    if declared > (max(FREE_BYTES, held * MOST_EXPANSION) if packed else held):
        what = f"{list(map(int, shape))} {dtype}, {declared:,} bytes"
        raise ValueError(f"the array {name!r} declares {what}, and the file has {held:,} bytes for it")


def read_npy(path: Path) -> np.ndarray:
    """Return the array of a .npy file. Raises OSError, or ValueError for what is none or declares too much."""
    with open_plain(path) as file:
        _check_npy(file, path.name, path.stat().st_size)
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


def read_npz(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return an array of an open .npz file. Raises KeyError, OSError, BadZipFile, or ValueError as `read_npy`."""
    member = f"{name}.npy" if f"{name}.npy" in archive.namelist() else name
    facts = archive.getinfo(member)
    check_declared(name, [facts.file_size], np.dtype("u1"), min(facts.compress_size, path.stat().st_size), packed=True)
    with archive.open(facts) as file:
        _check_npy(file, name, facts.file_size)
    with archive.open(facts) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check_npy(file: IO[bytes], name: str, size: int) -> None:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"the array {name!r} has a header of version {version}, expected 1.0 or 2.0")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError(f"the array {name!r} is pickled, and pickled arrays are not read")
    check_declared(name, shape, dtype, size - file.tell(), packed=False)


def read_hdf5(file: Any, name: str) -> np.ndarray:
    """Return a dataset of an open HDF5 file as an array of numbers. Raises as `own_dataset`, or as `read_npy`."""
    at = own_dataset(file, name)
    if at.dtype.kind not in "fiub":
        raise ValueError(f"{name!r} is {at.dtype}, and no array of numbers")
    held = int(at.id.get_storage_size())
    for shape in (at.shape or (), at.chunks or ()):
        check_declared(name, shape, at.dtype, held, packed=True)
    return np.asarray(at[()])


def own_dataset(file: Any, name: str) -> Any:
    """Return a dataset of an open HDF5 file whose bytes lie in that file. Raises KeyError, OSError or ValueError.

    Links into other files, virtual datasets and datasets whose bytes lie in other files are refused.
    """
    import h5py

    at = file
    for part in name.split("/"):
        if not part:
            continue
        if not isinstance(at, h5py.Group):
            raise KeyError(name)
        if isinstance(at.get(part, getlink=True), h5py.ExternalLink):
            raise ValueError(f"{name!r} leads into another file")
        at = at[part]
    if not isinstance(at, h5py.Dataset):
        raise ValueError(f"{name!r} is no dataset")
    if at.is_virtual or at.external or at.file.filename != file.filename:
        raise ValueError(f"the bytes of {name!r} lie in other files")
    return at
