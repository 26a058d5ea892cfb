"""Write states for other programs: `stillhouse inspect export` to .h5, .npz, .safetensors or .csv.

Guarantees: nothing that needs pickle is written. The file appears whole or not at all.
Try: `stillhouse inspect export STORE states.npz --view 'minilm/alone/6'`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ....data.errors import NoStoreError, StoreError, UsageError, first_few
from ....data.files.atomic import usual_mode
from ....data.files.patient import PatientFile
from ...store import Store, View
from ...store.disk.layout import dtype_of
from ..frames import is_speech, spans
from ..output import check_output, output_draft
from ..sample import available_rows, ids_of
from .utterance import pieces_of

MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class ExportedStates:
    path: str
    format: str
    views: list[str]
    utterances: int
    left_out: int  # utterances that some view lacks
    tokens: dict[str, int]  # by text teacher
    bytes: int
    frames: dict[str, int] = field(default_factory=dict)  # by speech teacher


def export(
    store: Store,
    views: Sequence[View],
    path: Path,
    *,
    rows: np.ndarray | None = None,
    float32: bool = False,
    force: bool = False,
) -> ExportedStates:
    """Write the states of utterances, with their token ids, pieces and spans.

    `rows` are those of `store.rows`; None: all. Utterances that some view lacks, or that teachers have from different
    texts, are left out.
    A speech teacher has the times of its frames instead, `TEACHER/time` float64 [N, 2], in seconds.
    Arrays are packed: `TEACHER/length` has the number of tokens or frames of each utterance. Without `float32`, int8
    and pq become float16, bfloat16 becomes float32, and other dtypes stay as they are.
    """
    check_output(path, _WRITERS, force, [store.path])
    available = available_rows(store, views)
    ids = ids_of(store, available)
    if rows is not None:
        held = set(ids)
        ids = [i for i in ids_of(store, rows) if i in held]
    asked = len(store.utterance_ids) if rows is None else len(rows)
    if not ids:
        what = f"none of {asked:,} utterances has states in {first_few([v.address for v in views])}"
        raise NoStoreError(what, where=store.address, remedy="name fewer views, or finish the extraction")
    arrays: dict[str, np.ndarray] = {}
    tokens: dict[str, int] = {}
    frames: dict[str, int] = {}
    for teacher in dict.fromkeys(v.teacher for v in views):
        if is_speech(store, teacher):
            lengths = store.row_lengths(teacher, store.rows(ids, teacher))
            frame = np.concatenate([np.arange(n) for n in lengths.tolist()])
            arrays |= {f"{teacher}/length": lengths, f"{teacher}/time": spans(store.plan.teachers[teacher], frame)}
            frames[teacher] = len(frame)
            continue
        lengths, token_id, span = store.tokens(ids, teacher)
        tokens[teacher] = len(token_id)
        arrays |= {f"{teacher}/length": lengths, f"{teacher}/token_id": token_id, f"{teacher}/span": span}
        arrays[f"{teacher}/piece"] = np.array(pieces_of(store, teacher, token_id), dtype=np.str_)
    size = sum((tokens | frames)[v.teacher] * store.teacher(v.teacher).width * 4 for v in views)
    if size > MOST_BYTES:
        what, expected = f"one file would have {size / 1e9:,.1f} GB", f"at most {MOST_BYTES / 1e9:,.1f} GB"
        remedy = "name fewer views or utterances, or open data.zarr itself with zarr, xarray or tensorstore"
        raise UsageError(what, where=path, expected=expected, remedy=remedy)
    for view in views:
        stored = dtype_of(store.teacher(view.teacher).dtype)
        dtype = "float32" if float32 or stored.logical == "bfloat16" else "float16" if stored.quantised else None
        arrays[view.address] = store.gather(ids, [view], dtype).states[view]
        if dtype == "float16" and not np.isfinite(arrays[view.address]).all():
            raise StoreError("a state does not fit into float16", where=view.address, remedy="export it with --float32")
    with output_draft(path) as draft:
        _WRITERS[path.suffix](draft, ids, arrays)
    addresses, left_out = [v.address for v in views], asked - len(ids)
    written = path.stat().st_size
    return ExportedStates(str(path), path.suffix[1:], addresses, len(ids), left_out, tokens, written, frames)


def _hdf5(path: Path, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
    """One dataset per array. `offset` beside `length` is where each utterance begins."""
    import h5py

    text = h5py.string_dtype()
    with PatientFile(path) as output, h5py.File(output, "w") as f:
        f.create_dataset("utterance", data=np.array(ids, object), dtype=text, shape=(len(ids),))
        for name, values in arrays.items():
            is_text = values.dtype.kind == "U"
            f.create_dataset(name, data=values.astype(object) if is_text else values, dtype=text if is_text else None)
            if name.endswith("/length"):
                ends = np.cumsum(values, dtype=np.int64)
                f.create_dataset(name.removesuffix("length") + "offset", data=ends - values)


def _npz(path: Path, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, allow_pickle=False, utterance=np.array(ids, dtype=np.str_), **arrays)


def _safetensors(path: Path, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
    """The format has no text tensors, so ids and pieces are JSON lists in the header's metadata."""
    from safetensors.numpy import save_file

    texts = {k: json.dumps(v.tolist(), ensure_ascii=False) for k, v in arrays.items() if v.dtype.kind == "U"}
    tensors = {k: np.ascontiguousarray(v) for k, v in arrays.items() if v.dtype.kind != "U"}
    with usual_mode(path):
        save_file(tensors, path, metadata={"utterance": json.dumps(ids, ensure_ascii=False), **texts})


def _csv(path: Path, ids: list[str], arrays: dict[str, np.ndarray]) -> None:
    """One line per token or frame and view. The states' columns are d0, d1, … of the widest view.

    A frame has its seconds in begin and end, and no token_id and piece.
    """
    views = [k for k in arrays if k.count("/") == 2]
    width = max(arrays[v].shape[1] for v in views)
    columns = ["view", "utterance", "token", "token_id", "piece", "begin", "end", *(f"d{i}" for i in range(width))]
    with open(path, "w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(columns)
        for view in views:
            teacher = view.split("/")[0]
            length = arrays[f"{teacher}/length"]
            if f"{teacher}/time" in arrays:
                rows = [["", "", *(f"{x:.6g}" for x in time)] for time in arrays[f"{teacher}/time"].tolist()]
            else:
                token_id, piece, span = (arrays[f"{teacher}/{n}"].tolist() for n in ("token_id", "piece", "span"))
                rows = [[t, p, *s] for t, p, s in zip(token_id, piece, span, strict=True)]
            of = np.repeat(np.arange(len(ids)), length)
            first = np.cumsum(length) - length
            for n, (u, state) in enumerate(zip(of, arrays[view])):
                out.writerow([view, ids[u], n - int(first[u]), *rows[n], *(f"{x:.6g}" for x in state.tolist())])


_WRITERS = {".h5": _hdf5, ".npz": _npz, ".safetensors": _safetensors, ".csv": _csv}
