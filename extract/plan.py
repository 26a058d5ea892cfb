"""Planning an extraction: tokenise all, order the sessions, lay out the shards, write the store's skeleton.

Invariant: the plan is a function of corpus, teacher and settings; it is on disk, whole, before any unit of work, and
never changes afterwards. Run: `stillhouse extract CORPUS STORE --teacher … --dry-run`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stillhouse.data.errors import CorpusError, StaleError, UsageError
from stillhouse.data.manifest import Corpus
from stillhouse.data.text import check_transform

from .store import plan as plans
from .store.arrays import create_array
from .store.files import Lock, fsync_folder, phase, write_json
from .store.index import write_index
from .store.layout import (
    Paths,
    array_json,
    check_teacher_name,
    dtype_of,
    group_json,
    hash_text,
    hidden_json,
    shard_rows,
)
from .store.plan import Generation, Plan, Shard, Work
from .store.writer import encode, versions
from .teacher import Teacher
from .tokens import Tokens
from .windows import check_context, parse_context


@dataclass(frozen=True)
class Request:
    """What a user asks to be extracted. `batch_tokens` None: by device."""

    name: str
    layers: Sequence[int]
    contexts: Sequence[str]
    transform: str = "none"
    join: str = ""
    dtype: str = "float16"
    batch_tokens: int | None = None
    core_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Layout:
    """Utterances in the order of the store, and their tokens."""

    ids: list[str]
    text_hash: np.ndarray  # uint64 [U]
    session: np.ndarray  # int32 [U], contiguous runs
    tokens: Tokens
    start: np.ndarray  # int64 [U]
    shard_rows: int
    shards: list[Shard]


def order_sessions(corpus: Corpus, seed: int) -> list[list[int]]:
    """Indices of utterances by session: sessions by a seeded hash of their name, utterances as in the manifest.

    A hash instead of a random permutation, so that a session's place does not depend on which others there are.
    """

    def key(session: list[int]) -> tuple[bytes, str]:
        first = corpus.utterances[session[0]]
        name = f"s:{first.session}" if first.session is not None else f"u:{first.id}"
        return hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest(), name

    return sorted(corpus.sessions(), key=key)


def lay_out(corpus: Corpus, teacher: Teacher, request: Request) -> Layout:
    """Tokenise the corpus in the order of the store and cut it into shards."""
    if not corpus.utterances:
        raise CorpusError("the corpus is empty", where=corpus.path)
    sessions = order_sessions(corpus, request.seed)
    utterances = [corpus.utterances[i] for s in sessions for i in s]
    tokens = teacher.tokeniser.encode([u.text for u in utterances], request.transform)
    lengths = tokens.length.astype(np.int64)
    if not lengths.any():
        raise CorpusError("no utterance has any text", where=corpus.path)
    rows = shard_rows(int(lengths.sum()), int(lengths.max()), teacher.width, dtype_of(request.dtype))
    shards, start = cut_shards(lengths, rows)
    return Layout(
        ids=[u.id for u in utterances],
        text_hash=np.array([hash_text(u.text) for u in utterances], dtype=np.uint64),
        session=np.repeat(np.arange(len(sessions), dtype=np.int32), [len(s) for s in sessions]),
        tokens=tokens,
        start=start,
        shard_rows=rows,
        shards=shards,
    )


def cut_shards(lengths: np.ndarray, rows: int) -> tuple[list[Shard], np.ndarray]:
    """Runs of whole utterances of at most `rows` tokens, and each utterance's first row (int64 [U])."""
    start = np.zeros(len(lengths), dtype=np.int64)
    shards: list[Shard] = []
    first = used = 0
    for u, n in enumerate(lengths.tolist()):
        if used + n > rows:
            shards.append(Shard(len(shards), first, u, used))
            first, used = u, 0
        start[u] = len(shards) * rows + used
        used += n
    shards.append(Shard(len(shards), first, len(lengths), used))
    return shards, start


def view_fingerprint(record: plans.Teacher, context: str, layer: int) -> str:
    """Hash of all settings that decide a view's numbers."""
    decides = (
        record.kind,
        record.architecture,
        record.weights_hash,
        record.tokenizer_hash,
        record.transform,
        record.join_ids,
        record.prefix_ids,
        record.suffix_ids,
        record.leading_space,
        record.window,
        record.dtype,
        record.model_dtype,
        context,
        layer,
    )
    return hashlib.blake2b(repr(decides).encode(), digest_size=16).hexdigest()


def teacher_record(teacher: Teacher, request: Request) -> plans.Teacher:
    """The teacher as the store will know it. Errors: UsageError for contexts, layers, names that cannot be."""
    check_transform(request.transform)
    layers = teacher.layer_numbers(request.layers)
    contexts = list(dict.fromkeys(request.contexts))
    t = teacher.tokeniser
    room = teacher.window - len(t.prefix) - len(t.suffix)
    for name in contexts:
        check_context(parse_context(name), teacher.kind, room)
        if parse_context(name).block:
            teacher.check_blocks()
    if not layers or not contexts:
        raise UsageError("nothing to extract", expected="a layer and a context at least")
    record = plans.Teacher(
        name=check_teacher_name(request.name),
        kind=teacher.kind,
        model=teacher.source,
        architecture=teacher.architecture,
        revision=teacher.revision,
        weights_hash=teacher.weights_hash(),
        tokenizer_hash=t.hash,
        transform=request.transform,
        join=request.join,
        join_ids=t.join_ids(request.join),
        prefix_ids=t.prefix,
        suffix_ids=t.suffix,
        leading_space=t.leading_space,
        width=teacher.width,
        depth=teacher.depth,
        window=teacher.window,
        dtype=request.dtype,
        model_dtype=teacher.dtype,
        contexts=contexts,
        layers=layers,
    )
    prints = {f"{c}/{k}": view_fingerprint(record, c, k) for c in contexts for k in layers}
    return replace(record, fingerprints=prints)


_WORDS = {
    "weights_hash": "the model's weights",
    "tokenizer_hash": "the tokenizer",
    "transform": "the text transform",
    "join": "the join string",
    "window": "the longest window",
    "dtype": "the stored dtype",
    "model_dtype": "the dtype of the model",
}


def differences(old: plans.Teacher, new: plans.Teacher) -> list[str]:
    """In words, which settings of a teacher differ."""
    out = []
    for name, words in _WORDS.items():
        if name == "weights_hash" and old.model_dtype != new.model_dtype:
            continue  # the same weights, cast
        a, b = getattr(old, name), getattr(new, name)
        if a != b:
            out.append(f"{words} (stored {a!r}, now {b!r})")
    return out


def check_same(plan: Plan, record: plans.Teacher, corpus: Corpus) -> None:
    """Errors: StaleError naming what differs between a store and what is asked for now."""
    old = plan.teachers[record.name]
    differ = differences(old, record)
    if differ:
        raise StaleError(
            f"teacher {record.name!r} was extracted with other settings: {'; '.join(differ)}",
            where=plan.paths.root,
            remedy="give the same settings, another --name, or another store",
        )
    from .store.reader import Store

    store = Store.open(plan.paths.root)
    rows = store.index.rows([u.id for u in corpus.utterances])
    unknown = [u.id for u, r in zip(corpus.utterances, rows) if r < 0]
    changed = [
        u.id for u, r in zip(corpus.utterances, rows) if r >= 0 and int(store.index.text_hash[r]) != hash_text(u.text)
    ]
    gone = len(store.index) - int((rows >= 0).sum())
    for names, words in ((changed, "have another text than in the store"), (unknown, "are not in the store")):
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise StaleError(
                f"{len(names)} utterances {words}: {listed}",
                where=plan.paths.root,
                remedy="extract the changed corpus into a new store",
            )
    if gone:
        raise StaleError(f"{gone} utterances of the store are not in the corpus", where=corpus.path)


def make_plan(root: Path, corpus: Corpus, teacher: Teacher, request: Request) -> Plan:
    """Read the store's plan, or write one where there is none. Callers may race: one writes, the others read it.

    Errors: StaleError where the store was made with other settings or from other texts.
    """
    paths = Paths(root)
    record = teacher_record(teacher, request)
    with Lock(paths.lock("plan"), wait=True):
        if paths.store_json.exists():
            plan = plans.read_plan(root)
        else:
            plan = _write_new(paths, corpus, teacher, record, request)
    if record.name not in plan.teachers:
        raise UsageError(
            f"the store holds {', '.join(plan.teachers)}, not {record.name!r}",
            where=root,
            remedy="extract another teacher into another store",
        )
    check_same(plan, record, corpus)
    old = plan.teachers[record.name]
    new = [f"{c}/{k}" for c in record.contexts for k in record.layers if f"{c}/{k}" not in old.fingerprints]
    if new:
        raise UsageError(f"not in this store's plan: {', '.join(new)}", where=root, remedy="use a new store")
    return plan


def _write_new(paths: Paths, corpus: Corpus, teacher: Teacher, record: plans.Teacher, request: Request) -> Plan:
    if paths.data.exists():  # a planner died here before it wrote store.json; nobody can have used this
        shutil.rmtree(paths.data)
    layout = lay_out(corpus, teacher, request)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    cuda = teacher.device.startswith("cuda")
    generation = Generation(
        number=0,
        teacher=record.name,
        work=[Work(c, record.layers, [s.number for s in layout.shards]) for c in record.contexts],
        shard_rows=layout.shard_rows,
        shards=layout.shards,
        batch_tokens=request.batch_tokens or (32768 if cuda else 4096),
        batch_overhead_tokens=1024 if cuda else 24,
        core_tokens=request.core_tokens,
        seed=request.seed,
        created=created,
    )
    corpus_facts = {"utterances": len(layout.ids), "sessions": int(layout.session[-1]) + 1}
    plan = Plan(paths, created, corpus_facts, versions(), {record.name: record}, [generation])
    write_index(paths, layout.ids, layout.text_hash, layout.session)
    write_teacher(paths, record, teacher, layout)
    write_json(paths.data / "zarr.json", group_json({"stillhouse": {"teachers": [record.name]}}))
    plans.write_generation(paths, generation)
    phase("planned")
    plans.write_head(plan)
    fsync_folder(paths.root)
    return plan


def write_teacher(paths: Paths, record: plans.Teacher, teacher: Teacher, layout: Layout) -> None:
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
    for name, meta in empty.items():
        create_array(group / name, meta)
    write_json(group / "zarr.json", group_json({"stillhouse": asdict(record)}))
