"""Compare the numbers of store.json with the arrays: a wrong width would read states at wrong places.

Guarantees: nothing is written, and only metadata is read. Arrays may be longer than the plan, because a planner may die
after it has made them grow.
Try: `pytest tests/extract/store/test_numbers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..disk.layout import dtype_of
from ..format.arrays import RawArray
from ..format.plan import Plan, TeacherRecord
from ..reader import Store

# Lists and tables of a teacher's record that grow: what is in force is the first part of what the arrays have.
_GROWING = ("contexts", "layers", "fingerprints")


def teacher_numbers(store: Store, name: str) -> Iterator[str]:
    """Yield what store.json says of a teacher that its arrays contradict. Damaged metadata is found elsewhere.

    Raises StoreError for an array whose metadata is damaged.
    """
    record, latest = store.plan.teachers[name], store.plan.latest(name)
    c, k, d = len(record.contexts), len(record.layers), record.width
    n, u = len(latest.shards) * latest.shard_rows, max((s.last for s in latest.shards), default=0)
    # The least length of each axis; a string says that it must be equal, and what it is.
    dimension, dtype = ("width", d), dtype_of(record.dtype)
    columns = ("codes", dtype.codes) if dtype.codes else dimension
    expected: dict[str, tuple[Any, ...]] = {
        dtype.array: (c, k, n, columns),
        "norm_mean": (c, k, dimension),
        "norm_std": (c, k, dimension),
        "crc32c": (c, k, u),
        "input_hash": (c, u),
        "context_left": (c, u),
        "context_right": (c, u),
        "start": (u,),
        "length": (u,),
    }
    if record.is_speech:
        expected["audio_source"] = (u, ("fields", 4))
    else:
        expected |= {"token_id": (n,), "span": (n, ("boundaries", 2))}
        expected |= {"vocab_id": (latest.vocabulary,), "embedding": (latest.vocabulary, 0)}
    if dtype.codes:
        expected["codebook"] = (c, k, columns, ("vectors", 256), ("dimensions a code", d // dtype.codes))
    words = ("contexts", "layers", "rows")
    for array, axes in expected.items():
        opened = RawArray(store.paths, name, array)
        for number, (axis, length) in enumerate(zip(axes, opened.shape)):
            if isinstance(axis, tuple):
                if axis[1] != length:
                    yield f"{name} has {axis[0]} {axis[1]:,}, but {array} has {length:,}"
            elif length < axis:
                word = words[number] if array in (dtype.array, "crc32c") and number < 2 else "rows"
                yield f"{name} has {axis:,} {word}, but {array} has {length:,}"
        if array == dtype.array:
            stored = opened.meta.get("attributes", {}).get("logical_dtype", record.dtype)
            if stored != record.dtype:
                yield f"{name} has the dtype {record.dtype}, but {array} has {stored}"
            if opened.chunks[2] != latest.shard_rows and opened.chunks[3] == columns[1]:
                yield f"{name} has shards of {latest.shard_rows:,} rows, but {array} has {opened.chunks[2]:,}"
    yield from _other_record(store.plan, record)


def _other_record(plan: Plan, record: TeacherRecord) -> Iterator[str]:
    """Yield the settings that differ between store.json and the teacher's group in data.zarr, which has them too."""
    group = plan.paths.files.read_json(plan.paths.data / record.name / "zarr.json")
    about = group.get("attributes", {}).get("stillhouse") if isinstance(group, dict) else None
    if not isinstance(about, dict):
        return  # The group was written by another program.
    for key, value in asdict(record).items():
        other = about.get(key, value)
        if key not in _GROWING:
            same = other == value
        elif isinstance(value, dict):
            same = isinstance(other, dict) and value.items() <= other.items()
        else:
            same = isinstance(other, list) and other[: len(value)] == value
        if not same:
            yield f"{record.name} has {key} {value!r:.60}, but its group in data.zarr has {other!r:.60}"


def corpus_numbers(store: Store) -> Iterator[str]:
    """Yield the counts of store.json that the tables of utterances contradict."""
    facts, index = store.plan.corpus, store.index
    counts = {
        "utterances": {len(index.order), int(index.live.sum())},
        "sessions": {int(index.session.max(initial=-1)) + 1},
    }
    for key, count in counts.items():
        if key in facts and facts[key] not in count:
            yield f"the corpus has {key} {facts[key]!r:.60}, but the tables of utterances have {max(count):,}"
