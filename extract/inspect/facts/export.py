"""States for other programs: `export` to .h5, .npz, .safetensors or .csv.

Invariant: nothing that needs pickle is written, and the file appears whole or not at all.
Exercised by: `stillhouse inspect export STORE states.npz --view 'minilm/alone/6'`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....data.errors import NoStoreError, StoreError, UsageError, first_few
from ...store import Store, View
from ..sample import held_rows
from .utterance import pieces_of

MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class ExportedStates:
    """What was written. Utterances that some view lacks are left out and counted."""

    path: str
    format: str
    views: list[str]
    utterances: int
    left_out: int
    tokens: dict[str, int]
    bytes: int


def export(
    store: Store,
    views: Sequence[View],
    path: Path,
    *,
    rows: np.ndarray | None = None,
    float32: bool = False,
    force: bool = False,
) -> ExportedStates:
    """Write states of utterances (rows of the store; None: all) with their token ids, pieces and spans.

    Arrays are packed: `TEACHER/length` says how many tokens each utterance has. float16 stays float16 and int8 becomes
    float16 unless `float32`; bfloat16 becomes float32. Errors: UsageError for a suffix that is no format, for more
    than 4 GiB at once and for a file that is there already; NoStoreError where no utterance is in all of the views.
    """
    writers: dict[str, Callable[[Path, list[str], dict[str, np.ndarray]], None]]
    writers = {".h5": _hdf5, ".npz": _npz, ".safetensors": _safetensors, ".csv": _csv}
    if path.suffix not in writers:
        raise UsageError(
            f"cannot write {path.suffix or 'a file without suffix'}", where=path, expected=", ".join(writers)
        )
    if path.exists() and not force:
        raise UsageError("is there already", where=path, remedy="remove it or give --force")
    held = held_rows(store, views)
    chosen = held if rows is None else rows[np.isin(rows, held)]
    asked = len(store.utterance_ids) if rows is None else len(rows)
    if not len(chosen):
        raise NoStoreError(
            f"none of {asked:,} utterances has states in {first_few([v.address for v in views])}",
            where=store.address,
            remedy="name fewer views, or finish the extraction",
        )
    ids = [store.index.id(int(r)) for r in chosen]
    arrays: dict[str, np.ndarray] = {}
    tokens: dict[str, int] = {}
    for teacher in dict.fromkeys(v.teacher for v in views):
        lengths, token_id, span = store.tokens(ids, teacher)
        tokens[teacher] = len(token_id)
        pieces = np.array(pieces_of(store, teacher, token_id), dtype=np.str_)
        arrays |= {f"{teacher}/length": lengths, f"{teacher}/token_id": token_id, f"{teacher}/span": span}
        arrays[f"{teacher}/piece"] = pieces
    size = sum(tokens[v.teacher] * store.teacher(v.teacher).width * 4 for v in views)
    if size > MOST_BYTES:
        raise UsageError(
            f"{size / 1e9:,.1f} GB in one file",
            where=path,
            expected=f"at most {MOST_BYTES / 1e9:,.1f} GB",
            remedy="name fewer views or utterances, or open data.zarr itself with zarr, xarray or tensorstore",
        )
    for view in views:
        stored = store.teacher(view.teacher).dtype
        wanted = "float32" if float32 or stored == "bfloat16" else "float16" if stored == "int8" else None
        arrays[view.address] = store.gather(ids, [view], wanted).states[view]
        if wanted == "float16" and not np.isfinite(arrays[view.address]).all():
            raise StoreError("a state does not fit into float16", where=view.address, remedy="export it with --float32")
    scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        writers[path.suffix](scratch, ids, arrays)
        os.replace(scratch, path)
    except OSError as e:
        raise StoreError(f"cannot be written: {e.strerror}", where=path) from e
    finally:
        scratch.unlink(missing_ok=True)
    addresses = [v.address for v in views]
    return ExportedStates(
        str(path), path.suffix[1:], addresses, len(ids), asked - len(ids), tokens, path.stat().st_size
    )


def _hdf5(path: Path, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
    """One dataset an array, at its name; `offset` beside `length` says where each utterance begins."""
    import h5py

    text = h5py.string_dtype()
    with h5py.File(path, "w") as f:
        f.create_dataset("utterance", data=np.array(ids, object), dtype=text, shape=(len(ids),))
        for name, values in arrays.items():
            if values.dtype.kind == "U":
                f.create_dataset(name, data=values.astype(object), dtype=text)
            else:
                f.create_dataset(name, data=values)
            if name.endswith("/length"):
                ends = np.cumsum(values, dtype=np.int64)
                f.create_dataset(name.removesuffix("length") + "offset", data=ends - values)


def _npz(path: Path, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
    values: dict = {"utterance": np.array(ids, dtype=np.str_), **arrays}
    np.savez(path, allow_pickle=False, **values)


def _safetensors(path: Path, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
    """Text has no place among tensors: ids and pieces are JSON lists in the header's metadata."""
    from safetensors.numpy import save_file

    texts = {k: json.dumps(v.tolist(), ensure_ascii=False) for k, v in arrays.items() if v.dtype.kind == "U"}
    tensors = {k: np.ascontiguousarray(v) for k, v in arrays.items() if v.dtype.kind != "U"}
    save_file(tensors, path, metadata={"utterance": json.dumps(ids, ensure_ascii=False), **texts})


def _csv(path: Path, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
    """One line a token and view; the states' columns are d0, d1, … of the widest view."""
    views = [k for k in arrays if k.count("/") == 2]
    width = max(arrays[v].shape[1] for v in views)
    with open(path, "w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(
            ["view", "utterance", "token", "token_id", "piece", "begin", "end", *(f"d{i}" for i in range(width))]
        )
        for view in views:
            teacher = view.split("/")[0]
            of = np.repeat(np.arange(len(ids)), arrays[f"{teacher}/length"])
            first = np.cumsum(arrays[f"{teacher}/length"]) - arrays[f"{teacher}/length"]
            for n, state in enumerate(arrays[view]):
                u, (begin, end) = of[n], arrays[f"{teacher}/span"][n].tolist()
                token = [n - int(first[u]), int(arrays[f"{teacher}/token_id"][n]), str(arrays[f"{teacher}/piece"][n])]
                out.writerow([view, ids[u], *token, begin, end, *(f"{x:.6g}" for x in state.tolist())])
