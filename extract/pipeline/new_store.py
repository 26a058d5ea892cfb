"""Write a drafted plan: the files of a new store, or what a generation adds to one.

These are tables of utterances, tokens, vocabulary, the metadata of all arrays, and the JSON records of the plan.

Guarantees: store.json is written last, so a plan is in force as a whole or not at all. Rows that a killed planner wrote
do not count, and the next planner writes them again.
Try: `stillhouse extract CORPUS STORE --teacher …`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ...data.files.atomic import sync
from ..speech.sounds import Sounds
from ..speech.teacher import SpeechTeacher
from ..store.disk.durable import WriteBatch
from ..store.disk.layout import array_json, codebook_json, dtype_of, group_json, hidden_json, scale_json
from ..store.format import plan as plans
from ..store.format.arrays import ArrayWriter, RawArray
from ..store.format.index import write_edition, write_index
from ..store.format.plan import Plan, TeacherRecord
from ..store.writer import encode
from ..teacher.tokenizer import Tokens
from .generation import without_teacher
from .layout import Layout, NewRows, PlanDraft


class VocabularySource(Protocol):
    """What the store keeps of a teacher's vocabulary: a `Teacher`, or what another store has of one."""

    @property
    def tokeniser(self) -> Any:
        """Its `pieces(ids)` returns the spelling of each token id."""

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        """Return the input embeddings of token ids, float32 [n, E]."""


def write_plan(draft: PlanDraft, teacher: VocabularySource | SpeechTeacher) -> None:
    """Write the last generation of a draft and bring it into force. The caller holds the lock `plan`."""
    plan, layout, new_rows = draft.plan, draft.layout, draft.new_rows
    paths, generation = plan.paths, plan.generations[-1]
    record, new_store = plan.teachers[generation.teacher], len(plan.generations) == 1
    if new_store and paths.data.exists():  # a planner was killed before it wrote store.json
        shutil.rmtree(paths.data)
    # Readers use the files of a store that exists, so only those of a new store may be synced at the end.
    batch = WriteBatch() if new_store else None
    writer = ArrayWriter(paths, batch)
    if new_store and layout is not None:
        write_index(writer, layout.ids, layout.text_hash, layout.session)
    if new_rows is not None:
        write_new_rows(writer, new_rows)
    if layout is not None:
        shutil.rmtree(paths.data / record.name, ignore_errors=True)  # a killed planner may have written it
        write_teacher(writer, record, teacher, layout)
    else:
        grow_teacher(writer, plan, new_rows)
        if new_rows is not None:
            write_tokens(writer, plan, new_rows, teacher)
    write_groups(writer, plan)
    plans.write_generation(plan, generation, writer.sums)
    if batch is not None:
        batch.sync()
    plans.write_head(plan)


def forget_teacher(plan: Plan, name: str) -> None:
    """Take a teacher of which nothing is committed out of a store. The caller has the store for itself."""
    paths, rest = plan.paths, without_teacher(plan, name)
    if rest.teachers:
        plans.write_head(rest)
        folders = [paths.data / name, paths.root / "commits" / name]
    else:
        paths.store_json.unlink()
        sync(paths.root)
        folders = [paths.data, paths.root / "commits", paths.root / "plan"]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def write_groups(writer: ArrayWriter, plan: Plan) -> None:
    """Write the metadata of the Zarr groups of all teachers."""
    writer.write_json(plan.paths.data / "zarr.json", group_json({"stillhouse": {"teachers": list(plan.teachers)}}))
    for name, record in plan.teachers.items():
        writer.write_json(plan.paths.data / name / "zarr.json", group_json({"stillhouse": record.as_json()}))


def write_teacher(
    writer: ArrayWriter, record: TeacherRecord, teacher: VocabularySource | SpeechTeacher | None, layout: Layout
) -> None:
    """Write the arrays of a teacher: tokens and vocabulary, and the metadata of those that work items fill.

    A speech teacher has no vocabulary, and the sources of its audio in the place of tokens.
    """
    u, s = len(layout.ids), layout.shard_rows
    n, c, k, d = len(layout.shards) * s, len(record.contexts), len(record.layers), record.width
    dtype = dtype_of(record.dtype)
    filled: dict[str, tuple[np.ndarray, str, tuple[int, ...], tuple[str, ...]]] = {
        "start": (layout.start, "i8", (u,), ("utterance",)),
        "length": (layout.tokens.length, "i4", (u,), ("utterance",)),
    }
    if isinstance(layout.tokens, Sounds):
        filled["audio_source"] = (layout.tokens.source, "i8", (u, 4), ("utterance", "audio_field"))
    else:
        assert teacher is not None and not isinstance(teacher, SpeechTeacher)
        token_id, span = _token_axis(layout.tokens, layout.start, n)
        vocabulary = np.unique(layout.tokens.ids).astype(np.int32)
        embedding, pieces = _embedding(teacher, vocabulary), _pieces(teacher, vocabulary)
        filled |= {
            "token_id": (token_id, "i4", (s,), ("token",)),
            "span": (span, "i4", (s, 2), ("token", "boundary")),
            "vocab_id": (vocabulary, "i4", vocabulary.shape, ("vocabulary",)),
            "vocab_piece": (pieces, "u1", pieces.shape, ("byte",)),
            "embedding": (embedding, "f2", embedding.shape, ("vocabulary", "embedding")),
        }
    for name, (values, numbers, chunks, dims) in filled.items():
        fill = -1 if name in ("token_id", "span") else 0
        writer.create((record.name, name), array_json(values.shape, numbers, chunks, dims, fill=fill), values)
    axes = ("context", "layer")
    empty = {
        dtype.array: hidden_json(c, k, n, d, s, dtype, record.axis),
        "norm_mean": array_json((c, k, d), "f4", (1, 1, d), (*axes, "dimension"), fill="NaN"),
        "norm_std": array_json((c, k, d), "f4", (1, 1, d), (*axes, "dimension"), fill="NaN"),
        "input_hash": array_json((c, u), "u8", (1, u), ("context", "utterance")),
        "context_left": array_json((c, u), "i4", (1, u), ("context", "utterance")),
        "context_right": array_json((c, u), "i4", (1, u), ("context", "utterance")),
        "crc32c": array_json((c, k, u), "u4", (1, 1, u), (*axes, "utterance")),
    }
    if dtype.scaled:
        empty["scale"] = scale_json(c, k, n, s, record.axis)
    if dtype.codes:
        empty["codebook"] = codebook_json(c, k, d, dtype.codes)
    for name, meta in empty.items():
        writer.create((record.name, name), meta)


def write_new_rows(writer: ArrayWriter, rows: NewRows) -> None:
    """Write the table of a changed corpus."""
    served = np.ones(len(rows.order), dtype=bool) if rows.served is None else rows.served
    write_edition(
        writer, rows.number, rows.first, rows.ids, rows.text_hash, rows.order, rows.session, served, rows.source
    )


def grow_teacher(writer: ArrayWriter, plan: Plan, new_rows: NewRows | None) -> None:
    """Make the arrays of the last generation's teacher as long as its contexts, layers, rows and tokens."""
    generation = plan.generations[-1]
    record = plan.teachers[generation.teacher]
    c, k = len(record.contexts), len(record.layers)
    n = len(generation.shards) * generation.shard_rows
    u = new_rows.first + len(new_rows.ids) if new_rows is not None else 0
    dtype = dtype_of(record.dtype)
    for name in (dtype.array, "scale") if dtype.scaled else (dtype.array,):
        writer.grow((record.name, name), {0: c, 1: k, 2: n})
    for name in dtype.norms:
        writer.grow((record.name, name), {0: c, 1: k})
    writer.grow((record.name, "crc32c"), {0: c, 1: k, 2: u})
    for name in ("input_hash", "context_left", "context_right"):
        writer.grow((record.name, name), {0: c, 1: u})


def write_tokens(
    writer: ArrayWriter, plan: Plan, new_rows: NewRows, teacher: VocabularySource | SpeechTeacher | None
) -> None:
    """Write the tokens of new rows, or the sources of their audio, and what they add to the vocabulary.

    Without additions no teacher is needed.
    """
    generation = plan.generations[-1]
    name, rows = generation.teacher, generation.shard_rows
    tokens, start, vocabulary, known = new_rows.tokens, new_rows.start, new_rows.vocabulary, new_rows.known
    assert tokens is not None and start is not None
    writer.append((name, "start"), start, new_rows.first)
    writer.append((name, "length"), tokens.length, new_rows.first)
    if isinstance(tokens, Sounds):
        writer.append((name, "audio_source"), tokens.source, new_rows.first)
        return
    assert vocabulary is not None and not isinstance(teacher, SpeechTeacher)
    end = len(generation.shards) * rows
    begin = int(start[0]) // rows * rows if len(start) else end
    token_id, span = _token_axis(tokens, start - begin, end - begin)
    writer.append((name, "token_id"), token_id, begin)
    writer.append((name, "span"), span, begin)
    if len(vocabulary) and teacher is not None:
        stored = bytes(RawArray(plan.paths, name, "vocab_piece").read()).split(b"\n")[:known]
        added = np.concatenate([np.frombuffer(b"\n", np.uint8), _pieces(teacher, vocabulary)])
        writer.append((name, "vocab_id"), vocabulary, known)
        writer.append((name, "embedding"), _embedding(teacher, vocabulary), known)
        writer.append((name, "vocab_piece"), added, len(b"\n".join(stored)), last=True)


def _token_axis(tokens: Tokens, start: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [rows] and [rows, 2]: token ids and spans at the places `start` of their utterances, -1 elsewhere."""
    token_id, span = np.full(rows, -1, dtype=np.int32), np.full((rows, 2), -1, dtype=np.int32)
    places = [np.arange(a, a + n) for a, n in zip(start.tolist(), tokens.length.tolist())]
    where = np.concatenate([np.zeros(0, int), *places])
    token_id[where], span[where] = tokens.ids, tokens.span
    return token_id, span


def _embedding(teacher: VocabularySource, ids: np.ndarray) -> np.ndarray:
    return encode(teacher.embedding(ids), dtype_of("float16"))


def _pieces(teacher: VocabularySource, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """uint8: the spellings of token ids, one a line."""
    spellings = teacher.tokeniser.pieces(np.asarray(ids).tolist())
    return np.frombuffer("\n".join(p.replace("\n", "⏎") for p in spellings).encode(), dtype=np.uint8)
