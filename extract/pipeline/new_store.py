"""The skeleton of a new store: index, tokens, metadata of all arrays, plan, and at last store.json.

Invariant: store.json is written last, so a store whose planner died does not exist and is planned again.
Run: `stillhouse extract CORPUS STORE --teacher …`.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict

import numpy as np

from ..store.disk.durable import crash_point, fsync_folder, synced_together, write_json
from ..store.disk.layout import Paths, array_json, dtype_of, group_json, hidden_json, scale_json
from ..store.format import plan as plans
from ..store.format.arrays import create_array
from ..store.format.block_sums import recording_sums
from ..store.format.index import write_index
from ..store.format.plan import Plan
from ..store.writer import encode
from ..teacher.model import Teacher
from .layout import Layout


def write_new_store(plan: Plan, teacher: Teacher, layout: Layout) -> None:
    """Write everything of a new plan; the caller holds the lock `plan`."""
    paths, generation = plan.paths, plan.generations[0]
    record = plan.teachers[generation.teacher]
    if paths.data.exists():  # a planner died here before it wrote store.json; nobody can have used this
        shutil.rmtree(paths.data)
    with synced_together(), recording_sums() as made:  # before store.json names any of it
        write_index(paths, layout.ids, layout.text_hash, layout.session)
        write_teacher(paths, record, teacher, layout)
        write_json(paths.data / "zarr.json", group_json({"stillhouse": {"teachers": [record.name]}}))
        plans.write_generation(plan, generation, made)
    crash_point("planned")
    plans.write_head(plan)
    fsync_folder(paths.root)


def write_teacher(paths: Paths, record: plans.TeacherRecord, teacher: Teacher, layout: Layout) -> None:
    """All arrays of a teacher: filled where the plan knows them, metadata alone where units fill them."""
    group = paths.data / record.name
    u, s = len(layout.ids), layout.shard_rows
    n, c, k, d = len(layout.shards) * s, len(record.contexts), len(record.layers), record.width
    tokens = layout.tokens
    where = np.concatenate(
        [np.arange(a, a + m) for a, m in zip(layout.start.tolist(), tokens.length.tolist())] or [np.zeros(0, int)]
    )
    token_id, span = np.full(n, -1, dtype=np.int32), np.full((n, 2), -1, dtype=np.int32)
    token_id[where], span[where] = tokens.ids, tokens.span
    vocab = np.unique(tokens.ids).astype(np.int32)
    embedding = encode(teacher.embedding(vocab), dtype_of("float16"))
    pieces = "\n".join(p.replace("\n", "⏎") for p in teacher.tokeniser.pieces(vocab.tolist())).encode()
    piece_bytes = np.frombuffer(pieces, dtype=np.uint8)
    filled = {
        "start": (layout.start, "i8", (u,), ("utterance",)),
        "length": (tokens.length, "i4", (u,), ("utterance",)),
        "token_id": (token_id, "i4", (s,), ("token",)),
        "span": (span, "i4", (s, 2), ("token", "boundary")),
        "vocab_id": (vocab, "i4", vocab.shape, ("vocabulary",)),
        "vocab_piece": (piece_bytes, "u1", piece_bytes.shape, ("byte",)),
        "embedding": (embedding, "f2", embedding.shape, ("vocabulary", "embedding")),
    }
    for name, (values, dtype, chunks, dims) in filled.items():
        fill = -1 if name in ("token_id", "span") else 0
        create_array(group / name, array_json(values.shape, dtype, chunks, dims, fill=fill), values)
    axes = ("context", "layer")
    empty = {
        "hidden": hidden_json(c, k, n, d, s, dtype_of(record.dtype)),
        "norm_mean": array_json((c, k, d), "f4", (1, 1, d), (*axes, "dimension"), fill="NaN"),
        "norm_std": array_json((c, k, d), "f4", (1, 1, d), (*axes, "dimension"), fill="NaN"),
        "input_hash": array_json((c, u), "u8", (1, u), ("context", "utterance")),
        "context_left": array_json((c, u), "i4", (1, u), ("context", "utterance")),
        "context_right": array_json((c, u), "i4", (1, u), ("context", "utterance")),
        "crc32c": array_json((c, k, u), "u4", (1, 1, u), (*axes, "utterance")),
    }
    if dtype_of(record.dtype).scaled:
        empty["scale"] = scale_json(c, k, n, s)
    for name, meta in empty.items():
        create_array(group / name, meta)
    write_json(group / "zarr.json", group_json({"stillhouse": asdict(record)}))
