"""Import states that another program has saved, with one file or one dataset for each utterance.

Guarantees: the store gets the states of the cache, at the tokens of the teacher's own tokenizer or at tokens that are
given. It is an error if an utterance has not as many states as tokens. Nothing is unpickled.
Try: `stillhouse store import CORPUS STORE --from FOLDER --teacher MODEL --layers 6 --file '{id}.npy'`.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import StoreError, UsageError
from ...data.files.declared import read_hdf5, read_npy, read_npz
from ...data.manifest import Corpus, Utterance
from ..pipeline.extract import extract
from ..pipeline.norms import Norms
from ..pipeline.progress import OnProgress, Summary
from ..pipeline.request import Request
from ..pipeline.runner import ItemRunner, OpenItem
from ..store.disk.layout import dtype_of
from ..store.format.int8 import quantise
from ..store.format.plan import WorkItem
from ..store.format.pq import encode_pq
from ..store.writer import encode
from ..teacher.tokenizer import Tokens

HDF5 = (".h5", ".hdf5")
READ = (".npy", ".npz", ".safetensors", *HDF5)
PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
FILE = "{id}.npy"  # of an utterance in a folder
# What zipfile, zlib, h5py and numpy raise for files that are damaged, encrypted or compressed by other methods.
_UNREADABLE = (KeyError, ValueError, OSError, EOFError, RuntimeError, TypeError, zipfile.BadZipFile, zlib.error)
PROBED = 20  # utterances that are read before anything is written


class _OpenFile:
    """Reads arrays from files. The last file of many arrays stays open, since many utterances may come from it."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None

    def close(self) -> None:
        if hasattr(self._file, "close"):
            self._file.close()
        self._path = self._file = None

    def _open(self, path: Path) -> Any:
        if path != self._path:
            self.close()
            if path.suffix in HDF5:
                import h5py

                self._file = h5py.File(path, "r")
            elif path.suffix == ".npz":
                self._file = zipfile.ZipFile(path)
            else:
                from safetensors import SafetensorError, safe_open

                try:
                    self._file = safe_open(path, "pt")  # numpy has no bfloat16
                except SafetensorError as e:
                    raise ValueError(str(e)) from e
            self._path = path
        return self._file

    def load(self, path: Path, name: str | None) -> np.ndarray:
        """Return an array of a file; None names the only one.

        Raises OSError for a file that is missing or cannot be read, KeyError for an array that it does not have, and
        ValueError if there are several arrays or the array would have to be unpickled.
        """
        if path.suffix == ".npy":
            return read_npy(path)
        if not path.is_file():
            raise FileNotFoundError(path)
        file = self._open(path)
        if name is None:
            listed = file.namelist() if path.suffix == ".npz" else list(file.keys())
            if len(listed) != 1:
                raise ValueError(f"{len(listed)} arrays, and no key says which")
            name = listed[0].removesuffix(".npy") if path.suffix == ".npz" else listed[0]
        if path.suffix in HDF5:
            return read_hdf5(file, name)
        if path.suffix == ".npz":
            return read_npz(path, file, name)
        from safetensors import SafetensorError

        try:
            tensor = file.get_tensor(name)
        except SafetensorError as e:
            raise KeyError(name) from e
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


@dataclass(frozen=True)
class ImportCache:
    """Where the states of each utterance are. `file` and `key` may name {id}, {layer}, {session}, {speaker}, {split}.

    As a context manager it closes the file that it has open.
    """

    source: Path  # a folder of files, or one .h5, .npz or .safetensors file with one dataset for each utterance
    layers: Sequence[int]  # numbers of the layers in the store, in the order of the cache
    file: str | None = None  # an utterance's file in the folder
    key: str | None = None  # an utterance's array in the file; None: the only one, or {id} in a single file
    layer_axis: int | None = None  # axis of an array that holds all layers; None: one array for each layer
    drop: tuple[int, int] = (0, 0)  # special tokens to leave out at the begin and the end of an array
    names: Mapping[str, str] = field(default_factory=dict)  # {utterance id: what {id} stands for}; others keep their id
    _files: _OpenFile = field(default_factory=_OpenFile, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.source.exists():
            raise UsageError("does not exist", where=self.source, expected="a folder, or one file of many arrays")
        if self.source.is_file() and self.file is not None:
            raise UsageError("--file names a file inside of a file", where=self.source, expected="--key alone")
        named = f"{self.file or ''}{self.key or ''}"
        if len(self.layers) > 1 and self.layer_axis is None and "{layer}" not in named:
            raise UsageError(
                f"{len(self.layers)} layers, and nothing says which is which",
                expected="a layer axis, or {layer} in the file's or the array's name",
            )
        _check_suffix(self.source if self.source.is_file() else self.source / (self.file or FILE))

    def __enter__(self) -> ImportCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def path(self, u: Utterance, layer: int) -> Path:
        """Return an utterance's file. Raises StoreError if its name leads out of the folder."""
        if self.source.is_file():
            return self.source
        path = self.source / self._fill(self.file or FILE, u, layer)
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
        """Return an array as the file has it. Raises StoreError, with the utterance, if it is missing or unreadable."""
        path, pattern = self.path(u, layer), key or self.key
        if pattern is None and self.source.is_file():
            pattern = "{id}"
        name = None if pattern is None else self._fill(pattern, u, layer)
        try:
            return self._files.load(path, name)
        except FileNotFoundError as e:
            raise StoreError(f"no states of it: {path} does not exist", where=u.id, remedy=_LESS) from e
        except MemoryError as e:
            what, remedy = f"{path}: {name or 'its array'} needs more memory than there is", _LESS
            raise StoreError(what, where=u.id, remedy=remedy) from e
        except _UNREADABLE as e:
            what = f"no array {name!r}" if isinstance(e, KeyError) else f"cannot be read: {e}"
            raise StoreError(f"{path}: {what}", where=u.id, expected="arrays of numbers", remedy=_LESS) from e

    def states(self, u: Utterance, layers: Sequence[int]) -> dict[int, np.ndarray]:
        """Return {layer: float32 [N, D]} of an utterance, without the special tokens that are dropped.

        Raises StoreError as `array`, and for an array of another shape.
        """
        states: dict[int, np.ndarray] = {}
        axis, (begin, end) = self.layer_axis, self.drop
        whole = None if axis is None else self.array(u, layers[0])
        for layer in layers:
            if whole is None or axis is None:
                values = self.array(u, layer)
            else:
                if whole.ndim != 3 or not -3 <= axis < 3 or whole.shape[axis] != len(self.layers):
                    expected = f"three axes, {len(self.layers)} layers along axis {axis}"
                    raise StoreError(f"an array of shape {list(whole.shape)}", where=u.id, expected=expected)
                values = np.take(whole, list(self.layers).index(layer), axis=axis)
            if values.ndim != 2 or values.dtype.kind != "f":
                what = f"an array of shape {list(values.shape)}, {values.dtype}"
                raise StoreError(what, where=u.id, expected="[tokens, width]")
            states[layer] = np.ascontiguousarray(values[begin : max(begin, len(values) - end)], dtype=np.float32)
        return states


def _check_suffix(path: Path) -> None:
    expected = ", ".join(READ)
    if path.suffix in PICKLED:
        remedy = "load them on a machine where you trust them, and save with numpy.save or safetensors"
        what = "pickled files are not read: they can run any code"
        raise UsageError(what, where=path, expected=expected, remedy=remedy)
    if path.suffix not in READ:
        raise UsageError(f"cannot read {path.suffix or 'a file without suffix'}", where=path, expected=expected)


class GivenTokens:
    """Token ids and spans out of a cache, instead of a tokenizer. The spelling of a token is its id."""

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
                raise StoreError(
                    f"token ids of shape {list(ids.shape)} and spans of shape {list(spans.shape)}",
                    where=u.id,
                    expected="[tokens] and [tokens, 2]",
                )
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
        tokens = [self._of.get(t, none) for t in texts]
        lengths = np.array([len(ids) for ids, _ in tokens], np.int32)
        ids, spans = ([none[i], *(t[i] for t in tokens)] for i in (0, 1))
        return Tokens(np.concatenate(ids), lengths, np.concatenate(spans))


@dataclass
class UnknownTeacher:
    """A teacher without its model: only its tokens are known, and its input embeddings are NaN."""

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
    embedding_rows: int = 1 << 31  # no limit is known

    def weights_hash(self) -> str:
        return f"imported from {self.source}"

    def layer_numbers(self, asked: Sequence[int]) -> list[int]:
        return sorted(set(asked))

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        return np.full((len(ids), 1), np.nan, np.float32)


class ImportRunner(ItemRunner):
    """Runs work items with a cache instead of a model."""

    def __init__(self, *arguments: Any, cache: ImportCache, corpus: Corpus) -> None:
        super().__init__(*arguments)
        self.cache, self.corpus = cache, corpus

    def __enter__(self) -> ImportRunner:
        return self

    def blocks(self, items: Iterable[OpenItem]) -> Iterator[tuple[OpenItem, Callable[[], None] | None]]:
        for opened in items:
            item = opened.item
            self.progress.item = str(item)
            norms = self.norms(item)
            for u in sorted({k.utterance for batch in opened.batches for window in batch for k in window.kept}):
                row = item.shard.first + u
                yield opened, partial(_write, opened, u, self._states(row, item.layers), norms)
                self.progress.rows += int(self.rows.length[row])
                if self.on_progress is not None:
                    self.on_progress(self.progress)
            yield opened, None

    def sample(self, item: WorkItem, rows: np.ndarray, layers: Sequence[int]) -> Iterator[tuple[int, dict]]:
        for row in rows.tolist():
            yield row, self._states(row, layers)

    def _states(self, row: int, layers: Sequence[int]) -> dict[int, np.ndarray]:
        u = self.corpus.by_id[self.index.id(row)]
        states = self.cache.states(u, layers)
        check_states(u, states, int(self.rows.length[row]), self.rows.width)
        return states


def _write(opened: OpenItem, u: int, states: dict[int, np.ndarray], norms: Norms) -> None:
    for layer, values in states.items():
        quantised = encode_pq if opened.writer.dtype.codes else quantise
        block = quantised(values, *norms[layer]) if norms else encode(values, opened.writer.dtype)
        opened.writer.write(layer, u, 0, block)


def check_states(u: Utterance, states: Mapping[int, np.ndarray], tokens: int, width: int) -> None:
    """Raise StoreError unless an utterance has as many states as tokens, and these have the teacher's width."""
    for layer, values in states.items():
        if len(values) != tokens:
            raise StoreError(
                f"layer {layer} has {len(values)} states for {tokens} tokens",
                where=u.id,
                expected="as many as the tokenizer makes of the transcript",
                remedy="check --drop (special tokens), --transform, and that tokenizer and text are those of the cache",
            )
        if values.shape[1] != width:
            raise StoreError(f"layer {layer} has states of width {values.shape[1]}", where=u.id, expected=f"{width}")


def import_states(
    root: Path,
    corpus: Corpus,
    cache: ImportCache,
    teacher: Any,
    request: Request,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Make a view of every layer of a cache. The same call resumes an import that was interrupted.

    `teacher` is the one that made the states: a `Teacher`, or an `UnknownTeacher`. A few utterances are read before
    anything is written.

    Raises:
        StoreError: names an utterance that the cache does not have, or has with another length.
        StaleError, LockedError: as `extract`.
    """
    dtype_of(request.dtype)
    with cache:
        with_text = [u for u in corpus.utterances if u.text.strip()]
        probed = with_text[:: max(1, len(with_text) // PROBED)]
        tokens = teacher.tokeniser.encode([u.text for u in probed], request.transform).length.tolist()
        for u, n in zip(probed, tokens):
            if n:
                check_states(u, cache.states(u, cache.layers), n, teacher.width)
        make_runner = partial(ImportRunner, cache=cache, corpus=corpus)
        return extract(root, corpus, teacher, request, on_progress, make_runner=make_runner)


def read_names(path: Path) -> dict[str, str]:
    """Read a table of two columns, utterance id and name. Raises UsageError for a line without a tab."""
    names = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            utterance, tab, name = line.partition("\t")
            if not tab:
                raise UsageError("no tab in this line", where=f"{path}:{number}", expected="utterance id, tab, name")
            names[utterance] = name
    return names


_LESS = "leave the utterance out of the manifest, or name the splits that are there with --split"
