"""States that another program has cached, an utterance a file or a dataset, into a store.

Invariant: what is written is what the cache holds, at the tokens of the teacher's own tokenizer (or those that are
given); another number of states than tokens is an error, and nothing is unpickled.
Run: `stillhouse store import CORPUS STORE --from FOLDER --teacher MODEL --layers 6 --file '{id}.npy'`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import StoreError, UsageError
from ...data.manifest import Corpus, Utterance
from ..pipeline.extract import extract
from ..pipeline.progress import Report, Summary
from ..pipeline.request import Request
from ..pipeline.runner import ItemRunner, OpenItem
from ..store.disk.layout import dtype_of
from ..store.format.int8 import quantise
from ..store.format.plan import WorkItem
from ..store.writer import encode
from ..teacher.tokenizer import Tokens

HDF5 = (".h5", ".hdf5")
READ = (".npy", ".npz", ".safetensors", *HDF5)
PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
PROBED = 20  # utterances that are read before anything is written


@dataclass(frozen=True)
class ImportCache:
    """Where the states of an utterance lie. `file` and `key` may name {id}, {layer}, {session}, {speaker} and {split}.

    source      a folder of files; or one .h5, .npz or .safetensors with a dataset an utterance
    file        an utterance's file in that folder
    key         its array in the file; None: the only one, or {id} in one file
    layers      what the store calls the layers, in the cache's order
    layer_axis  of an array that holds them all; None: an array a layer
    drop        special tokens at an array's begin and end that are left out
    names       {utterance id: what {id} stands for}; those without are called as they are
    """

    source: Path
    layers: Sequence[int]
    file: str | None = None
    key: str | None = None
    layer_axis: int | None = None
    drop: tuple[int, int] = (0, 0)
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source.exists():
            raise UsageError("is not there", where=self.source, expected="a folder, or one file of many arrays")
        if self.source.is_file() and self.file is not None:
            raise UsageError("a file within a file", where=self.source, expected="--key alone")
        named = f"{self.file or ''}{self.key or ''}"
        if len(self.layers) > 1 and self.layer_axis is None and "{layer}" not in named:
            raise UsageError(f"{len(self.layers)} layers, and nothing says which is which",
                             expected="a layer axis, or {layer} in the file's or the array's name")  # fmt: skip
        _readable(self.source if self.source.is_file() else self.source / self._file_pattern)

    @property
    def _file_pattern(self) -> str:
        return self.file or "{id}.npy"

    def path(self, u: Utterance, layer: int) -> Path:
        """Errors: StoreError where a name leads out of the folder."""
        if self.source.is_file():
            return self.source
        path = self.source / self._fill(self._file_pattern, u, layer)
        if not path.resolve().is_relative_to(self.source.resolve()):
            raise StoreError(f"its file would lie outside of the cache: {path}", where=u.id)
        return path

    def _fill(self, pattern: str, u: Utterance, layer: int) -> str:
        values = {"id": self.names.get(u.id, u.id), "layer": layer, "session": u.session, "speaker": u.speaker}
        try:
            return pattern.format(**values, split=u.split)
        except (KeyError, IndexError, ValueError) as e:
            raise UsageError(f"{pattern!r} cannot be filled in: {e}", expected="{id}, {layer}, {session}, …") from e

    def array(self, u: Utterance, layer: int, key: str | None = None) -> np.ndarray:
        """One array as the file has it. Errors: StoreError naming the utterance where it is not there or unreadable."""
        path, pattern = self.path(u, layer), key or self.key
        if pattern is None and self.source.is_file():
            pattern = "{id}"
        name = None if pattern is None else self._fill(pattern, u, layer)
        try:
            return _load(path, name)
        except FileNotFoundError as e:
            raise StoreError(f"no states of it: {path} is not there", where=u.id, remedy=_LESS) from e
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as e:
            what = f"no array {name!r}" if isinstance(e, KeyError) else f"cannot be read: {e}"
            raise StoreError(f"{path}: {what}", where=u.id, expected="arrays of numbers", remedy=_LESS) from e

    def states(self, u: Utterance, layers: Sequence[int]) -> dict[int, np.ndarray]:
        """{layer: float32 [N, D]}, special tokens dropped. Errors: as `array`, and for an array of another shape."""
        found: dict[int, np.ndarray] = {}
        whole = self.array(u, layers[0]) if self.layer_axis is not None else None
        for layer in layers:
            if whole is None:
                values = self.array(u, layer)
            else:
                axis = self.layer_axis
                assert axis is not None
                if whole.ndim != 3 or not -3 <= axis < 3 or whole.shape[axis] != len(self.layers):
                    raise StoreError(
                        f"an array of shape {list(whole.shape)}", where=u.id,
                        expected=f"three axes, {len(self.layers)} layers along axis {axis}",
                    )  # fmt: skip
                values = np.take(whole, list(self.layers).index(layer), axis=axis)
            if values.ndim != 2 or values.dtype.kind != "f":
                raise StoreError(
                    f"an array of shape {list(values.shape)}, {values.dtype}", where=u.id, expected="[tokens, width]"
                )
            begin, end = self.drop
            found[layer] = np.ascontiguousarray(values[begin : max(begin, len(values) - end)], dtype=np.float32)
        return found


def _readable(path: Path) -> None:
    if path.suffix in PICKLED:
        raise UsageError(
            "pickled files are not read: they can run any code",
            where=path,
            expected=", ".join(READ),
            remedy="load them on a machine where you trust them, and save with numpy.save or safetensors",
        )
    if path.suffix not in READ:
        raise UsageError(f"cannot read {path.suffix or 'a file without suffix'}", where=path, expected=", ".join(READ))


_opened: dict[Path, Any] = {}


def _open(path: Path) -> Any:
    """A file that holds many arrays; the last one stays open, since many utterances may come from it."""
    if path not in _opened:
        close()
        if path.suffix in HDF5:
            import h5py

            _opened[path] = h5py.File(path, "r")
        elif path.suffix == ".npz":
            _opened[path] = np.load(path, allow_pickle=False)
        else:
            from safetensors import SafetensorError, safe_open

            try:
                _opened[path] = safe_open(path, "pt")  # numpy has no bfloat16
            except SafetensorError as e:
                raise ValueError(str(e)) from e
    return _opened[path]


def close() -> None:
    """Close what is open."""
    for file in _opened.values():
        if hasattr(file, "close"):
            file.close()
    _opened.clear()


def _load(path: Path, name: str | None) -> np.ndarray:
    """Errors: FileNotFoundError, KeyError, ValueError (also for what would have to be unpickled), OSError."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if not path.is_file():
        raise FileNotFoundError(path)
    file = _open(path)
    names = list(file.keys()) if name is None else []
    if name is None and len(names) != 1:
        raise ValueError(f"{len(names)} arrays, and no key says which")
    name = names[0] if name is None else name
    if path.suffix in HDF5:
        import h5py

        if not isinstance(file[name], h5py.Dataset):
            raise ValueError(f"{name!r} is no dataset")
        return np.asarray(file[name][()])
    if path.suffix == ".npz":
        return file[name]
    from safetensors import SafetensorError

    try:
        tensor = file.get_tensor(name)
    except SafetensorError as e:
        raise KeyError(name) from e
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


class GivenTokens:
    """Token ids and spans out of a cache, in the place of a tokenizer. Pieces are the ids themselves."""

    prefix: Sequence[int] = ()
    suffix: Sequence[int] = ()
    leading_space = False

    def __init__(self, cache: ImportCache, corpus: Corpus, ids_key: str, spans_key: str) -> None:
        self._of: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        begin, end = cache.drop
        digest = hashlib.blake2b(digest_size=16)
        for u in corpus.utterances:
            if not u.text.strip() or u.text in self._of:
                continue
            ids, spans = (cache.array(u, cache.layers[0], k) for k in (ids_key, spans_key))
            if ids.ndim != 1 or spans.shape != (len(ids), 2):
                raise StoreError(f"token ids {list(ids.shape)} and spans {list(spans.shape)}", where=u.id)
            kept = slice(begin, max(begin, len(ids) - end))
            ids, spans = ids[kept].astype(np.int32), spans[kept].astype(np.int32)
            if len(spans) and (spans.min() < 0 or spans.max() > len(u.text)):
                raise StoreError("a span lies outside of the transcript", where=u.id, expected="code points of it")
            self._of[u.text] = ids, spans
            digest.update(u.text.encode() + b"\0" + ids.tobytes() + spans.tobytes())
        self.hash = digest.hexdigest()

    def join_ids(self, join: str) -> list[int]:
        return []

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [str(i) for i in ids]

    def encode(self, texts: Sequence[str], transform_name: str) -> Tokens:
        none = np.zeros(0, np.int32), np.zeros((0, 2), np.int32)
        found = [self._of.get(t, none) for t in texts]
        lengths = np.array([len(ids) for ids, _ in found], np.int32)
        ids, spans = ([none[i], *(f[i] for f in found)] for i in (0, 1))
        return Tokens(np.concatenate(ids), lengths, np.concatenate(spans))


@dataclass
class UnknownTeacher:
    """A teacher of which nothing is there but its tokens: its input embeddings are NaN."""

    tokeniser: Any
    source: str
    width: int
    depth: int
    kind: str = "encoder"
    window: int = 1 << 20
    architecture: str = "imported"
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    about: str = "imported without its model"

    def weights_hash(self) -> str:
        return f"imported from {self.source}"

    def layer_numbers(self, asked: Sequence[int]) -> list[int]:
        return sorted(set(asked))

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        return np.full((len(ids), 1), np.nan, np.float32)

    def check_blocks(self) -> None:
        """There is no model to ask."""


class ImportRunner(ItemRunner):
    """Makes units of work of a cache instead of a model."""

    def __init__(self, *arguments: Any, cache: ImportCache, corpus: Corpus) -> None:
        super().__init__(*arguments)
        self.cache, self.corpus = cache, corpus

    def __enter__(self) -> ImportRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        close()

    def blocks(self, jobs: Iterable[OpenItem]) -> Iterator[tuple[OpenItem, Callable[[], None] | None]]:
        for job in jobs:
            self.progress.item = str(job.item)
            norms = self.norms(job.item)
            for u in sorted({k.utterance for batch in job.batches for window in batch for k in window.kept}):
                yield job, partial(_write, job, u, self._states(job.item.shard.first + u, job.item.layers), norms)
                self.progress.rows += int(self.rows.length[job.item.shard.first + u])
                if self.report is not None:
                    self.report(self.progress)
            yield job, None

    def sample(self, item: WorkItem, rows: np.ndarray, layers: Sequence[int]) -> Iterator[tuple[int, dict]]:
        for row in rows.tolist():
            yield row, self._states(row, layers)

    def _states(self, row: int, layers: Sequence[int]) -> dict[int, np.ndarray]:
        u = self.corpus.by_id[self.index.id(row)]
        states = self.cache.states(u, layers)
        check_states(u, states, int(self.rows.length[row]), self.rows.width)
        return states


def _write(
    job: OpenItem, u: int, states: dict[int, np.ndarray], norms: dict[int, tuple[np.ndarray, np.ndarray]]
) -> None:
    for layer, values in states.items():
        kept = quantise(values, *norms[layer]) if norms else encode(values, job.writer.dtype)
        job.writer.write(layer, u, 0, kept)


def check_states(u: Utterance, states: Mapping[int, np.ndarray], tokens: int, width: int) -> None:
    """Errors: StoreError naming the utterance and both lengths, or both widths."""
    for layer, values in states.items():
        if len(values) != tokens:
            raise StoreError(
                f"layer {layer} has {len(values)} states for {tokens} tokens",
                where=u.id,
                expected="as many as the tokenizer makes of the transcript",
                remedy="look at --drop (special tokens), --transform, and whether this is its tokenizer and its text",
            )
        if values.shape[1] != width:
            raise StoreError(f"layer {layer} is {values.shape[1]} wide", where=u.id, expected=f"{width}")


def import_states(
    root: Path, corpus: Corpus, cache: ImportCache, teacher: Any, request: Request, report: Report | None = None
) -> Summary:
    """Make a view of every layer of the cache. Again it goes on where it ended.

    `teacher` is what made the states (a `Teacher`, or `Unknown`). Errors: StoreError naming utterances that the cache
    lacks or holds with another length; as `run.extract`.
    """
    dtype_of(request.dtype)
    try:
        full = [u for u in corpus.utterances if u.text.strip()]
        probed = full[:: max(1, len(full) // PROBED)]
        tokens = teacher.tokeniser.encode([u.text for u in probed], request.transform).length.tolist()
        for u, n in zip(probed, tokens):
            if n:
                check_states(u, cache.states(u, cache.layers), n, teacher.width)
        maker = partial(ImportRunner, cache=cache, corpus=corpus)
        return extract(root, corpus, teacher, request, report, maker=maker)
    finally:
        close()


def read_names(path: Path) -> dict[str, str]:
    """A table of two columns, utterance id and name, parted by tabs. Errors: UsageError for other lines."""
    names = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            utterance, tab, name = line.partition("\t")
            if not tab:
                raise UsageError("no tab in this line", where=f"{path}:{number}", expected="utterance id, tab, name")
            names[utterance] = name
    return names


_LESS = "leave the utterance out of the manifest, or name the splits that are there with --split"
