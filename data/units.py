"""ASR units: the output symbols of a recogniser, as characters or sentencepiece pieces.

Guarantees: no text encodes to unit 0, the blank. Every unit of a text has its span in the raw text.
decode(encode(text)) is the transformed text, unless it holds a symbol that is not in the units (unit 1).
Try: `stillhouse corpus tokenizer corpus.jsonl units`.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError, CorpusError
from .files.atomic import read_plain, write_atomic
from .files.trouble import not_written
from .text import MARK, SPACE_MARK, MappedText, check_transform, transform, transform_around, transformed

FORMAT, VERSION = "stillhouse-units", 1
BLANK, UNKNOWN = 0, 1
BLANK_PIECE, UNKNOWN_PIECE, UNKNOWN_TEXT = "<blank>", "<unk>", "⁇"
KINDS = ("characters", "sentencepiece")


@dataclass(frozen=True, eq=False)
class Encoded:
    """The units of a text, and their half-open ranges of code points in the raw text."""

    ids: np.ndarray  # int32 [U]
    spans: np.ndarray  # int32 [U, 2]


class Units:
    """A vocabulary of units. `pieces[k]` is the text of unit k, with ▁ for a space.

    Every transform ends with `squeeze`, because ▁ must mean one space. `model` is that of sentencepiece. `marks` are
    texts like [noise] that are a unit each, and that the transform leaves as they are.
    """

    def __init__(
        self, kind: str, transform: str, pieces: Sequence[str], model: bytes | None = None, marks: Iterable[str] = ()
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"unknown kind of units {kind!r}", expected=" or ".join(KINDS))
        self.kind, self.transform, self.pieces = kind, check_transform(transform), list(pieces)
        self._model = model
        self._steps = transform if transform.split("+")[-1].strip() == "squeeze" else f"{transform}+squeeze"
        self.marks = frozenset(marks)
        if unknown := sorted(m for m in self.marks if not MARK.fullmatch(m) or " " in m):
            raise ConfigError(f"{unknown[0]!r} cannot be a unit", expected="marks like <noise> or [noise]")
        self._id = {piece: k for k, piece in enumerate(self.pieces)}

    @property
    def size(self) -> int:
        """The number of units V, with the blank."""
        return len(self.pieces)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides which units a text becomes."""
        facts = [self.kind, self.transform, self.pieces, *([sorted(self.marks)] if self.marks else [])]
        head = json.dumps(facts, ensure_ascii=False).encode()
        return blake2b(head + b"\0" + (self._model or b""), digest_size=8).hexdigest()

    def __repr__(self) -> str:
        return f"Units({self.kind}, size={self.size}, transform={self.transform!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_processor", "_unit_of")}

    def normalise(self, text: str) -> MappedText:
        """Return the text as the units spell it, with its map to the raw text."""
        return transform_around(text, self._steps, self.marks) if self.marks else transform(text, self._steps)

    def encode(self, text: str) -> Encoded:
        """Return the units of a raw transcript. A symbol that is not in the units becomes unit 1, `UNKNOWN`."""
        mapped = self.normalise(text)
        if self.kind == "characters" and not self.marks:
            return Encoded(self._characters(mapped.text), mapped.source.copy())  # The shared map is read-only.
        if self.kind == "characters":
            names = [SPACE_MARK if name == " " else name for name in self._symbols(mapped.text)]
            ends = np.cumsum([len(name) for name in names], dtype=np.int64)
            spans = mapped.spans(np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)) if names else mapped.source
        else:
            names = self._processor.encode(mapped.text, out_type=str)
            spans = self._spans(names, mapped)
        return Encoded(self._named(names), spans)

    def ids(self, text: str) -> np.ndarray:
        """Return the units of a raw transcript without their spans, int32 [U]. It is faster than `encode`."""
        if self.kind == "characters" and self.marks:
            return self.encode(text).ids
        plain = self.normalise(text).text if self.marks else transformed(text, self._steps)
        if self.kind == "characters":
            return self._characters(plain)
        return self._named(self._processor.encode(plain, out_type=str))

    def _named(self, names: Iterable[str]) -> np.ndarray:
        """Return the units with these names. A text may hold the name of unit 0, the blank, which is unknown, too."""
        unit_of = self._id.get
        return np.array([unit_of(name) or UNKNOWN for name in names], np.int32)

    def _characters(self, text: str) -> np.ndarray:
        """Return the unit of each character."""
        return self._unit_of[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]

    @cached_property
    def _unit_of(self) -> np.ndarray:
        """int32 [code points]: the unit of each character."""
        table = np.full(sys.maxunicode + 1, UNKNOWN, np.int32)
        for piece, unit in self._id.items():
            if len(piece) == 1 and unit != BLANK:
                table[ord(" " if piece == SPACE_MARK else piece)] = unit
        return table

    def _symbols(self, text: str) -> list[str]:
        """Return the characters of a text, and its marks whole."""
        if not self.marks:
            return list(text)
        return [part for part in re.split(f"({'|'.join(map(re.escape, sorted(self.marks)))}|.)", text) if part]

    def _spans(self, names: list[str], mapped: MappedText) -> np.ndarray:
        """Spans from the lengths of the pieces, which spell the text with ▁ for each space and one more in front."""
        spelled = SPACE_MARK + mapped.text.replace(" ", SPACE_MARK) if mapped.text else ""
        if "".join(names) != spelled:
            expected = "pieces that spell the text"
            raise CorpusError("sentencepiece changed the text", where=mapped.raw[:60], expected=expected)
        ranges = np.empty((len(names), 2), np.int64)
        at = -1  # The mark in front stands for no character.
        for k, name in enumerate(names):
            begin, end = max(at, 0), at + len(name)
            at = end
            # The space belongs to the gap between words, unless the piece is only a space.
            if name[0] == SPACE_MARK and len(name) > 1 and begin < end and mapped.text[begin] == " ":
                begin += 1
            ranges[k] = begin, end
        empty = ranges[:, 0] >= ranges[:, 1]  # a piece that is only the mark in front
        out = mapped.spans(np.where(empty[:, None], [[0, 1]], ranges)) if mapped.text else np.empty((0, 2), np.int32)
        out[empty, 1] = out[empty, 0]
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of units. Blanks are left out, and unknown symbols become ⁇."""
        parts = []
        for k in ids:
            if not 0 <= k < self.size:
                raise ValueError(f"unit {k} of {self.size}")
            if k != BLANK:
                parts.append(UNKNOWN_TEXT if k == UNKNOWN else self.pieces[k])
        text = "".join(parts).replace(SPACE_MARK, " ")
        return text.removeprefix(" ") if self.kind == "sentencepiece" else text

    def score(self, unit: int) -> float:
        """Return the log-probability by which sentencepiece chooses a piece, or 0 for a character."""
        return float(self._processor.get_score(unit)) if self.kind == "sentencepiece" else 0.0

    @cached_property
    def _processor(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self._model)

    def save(self, folder: Path | str) -> None:
        """Write a folder with units.json and, for sentencepiece, spm.model.

        A kill between the two leaves a folder that `load_units` refuses by its fingerprint.
        """
        folder = Path(folder)
        head = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "transform": self.transform,
            "size": self.size,
            "fingerprint": self.fingerprint,
            "pieces": self.pieces,
            **({"marks": sorted(self.marks)} if self.marks else {}),
        }
        files = {"units.json": (json.dumps(head, ensure_ascii=False, indent=1) + "\n").encode()}
        if self._model is not None:
            files = {"spm.model": self._model, **files}
        for name, data in files.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(folder / name, data)
            except OSError as e:
                raise not_written(CorpusError, e, folder / name, "the units cannot be written") from None


def is_units(folder: Path) -> bool:
    """Return whether `corpus tokenizer` wrote a folder, and not `train`, whose models need their own units."""
    try:
        head = json.loads(read_plain(folder / "units.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(head, dict) and head.get("format") == FORMAT and not (folder.parent / "identity.json").exists()


def load_units(folder: Path | str) -> Units:
    """Read a folder that `Units.save` wrote. Raises CorpusError if it is missing, damaged or of another version."""
    folder = Path(folder)
    path = folder / "units.json"
    remedy = "make it again with `stillhouse corpus tokenizer CORPUS UNITS`"
    try:
        head = json.loads(read_plain(path))
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f"not {FORMAT}")
        if head["version"] != VERSION:
            raise CorpusError(f"units of version {head['version']}", where=path, expected=f"version {VERSION}")
        kind, name, pieces = head["kind"], head["transform"], head["pieces"]
        if not isinstance(name, str):
            raise ValueError("transform is not a text")
        if not isinstance(pieces, list) or not all(isinstance(p, str) for p in pieces):
            raise ValueError("pieces is not a list of texts")
        model = read_plain(folder / "spm.model") if kind == "sentencepiece" else None
        marks = head.get("marks", [])
        if not isinstance(marks, list) or not all(isinstance(m, str) for m in marks):
            raise ValueError("marks is not a list of texts")
        units = Units(kind, name, pieces, model, marks)
        if units.fingerprint != head.get("fingerprint"):
            raise ValueError("they do not match their fingerprint")
        return units
    except FileNotFoundError as e:
        raise CorpusError("there are no units", where=e.filename, remedy=remedy) from e
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as e:
        why = f"{e} is missing" if isinstance(e, KeyError) else str(e)
        raise CorpusError(f"the units are damaged: {why}", where=path, remedy=remedy) from e


def train_units(
    texts: Iterable[str],
    kind: str = "sentencepiece",
    size: int = 500,
    transform: str = "lower+no_punct+squeeze",
    coverage: float = 1.0,
    marks: Iterable[str] = (),
) -> Units:
    """Learn units from raw transcripts. Raises ConfigError if `size` cannot hold the characters.

    `size` is the most units, with blank and unknown. A small corpus gets fewer. `coverage` is the share of the text
    whose characters get units of their own. Use less than 1 for Chinese, or for transcripts with stray symbols. `marks`
    get a unit each, see `Units`.
    """
    if not 0.9 <= coverage <= 1.0:
        raise ConfigError(f"a coverage of {coverage}", expected="0.9 to 1")
    # A transcript may hold the usual names of units 0 and 1. Then these have others.
    special = ["<blank-unit>" if BLANK_PIECE in (marks := sorted(set(marks))) else BLANK_PIECE]
    special.append(UNKNOWN_TEXT if UNKNOWN_PIECE in marks else UNKNOWN_PIECE)
    plain = Units(kind, transform, special, None, marks)
    lines = [line for text in texts if (line := plain.normalise(text).text)]
    if not lines:
        raise CorpusError("no text to learn units from", expected="at least one transcript that is not empty")
    counts = Counter(c for line in lines for c in plain._symbols(line) if c not in plain.marks)
    characters = _covered(counts, coverage)
    # Every word of sentencepiece begins with a space.
    needed = 2 + len(characters) + len(marks) + (kind == "sentencepiece" and " " not in characters)
    if size < needed:
        what = f"{size} units cannot hold the {len(characters)} characters of the transcripts"
        remedy = "or use a --coverage below 1, or a transform that leaves fewer (casefold, no_punct, nfkc)"
        raise ConfigError(what, expected=f"--size {needed} or more", remedy=remedy)
    if kind == "characters":
        pieces = [SPACE_MARK if c == " " else c for c in characters]
        return Units(kind, transform, [*special, *marks, *pieces], None, marks)
    return _train_sentencepiece(lines, size, transform, coverage, special, marks)


def _covered(counts: Counter[str], coverage: float) -> list[str]:
    """The most frequent characters that make up `coverage` of the text, most frequent first, ties in code order."""
    ordered = sorted(counts, key=lambda c: (-counts[c], c))
    before = accumulate((counts[c] for c in ordered), initial=0)
    return [c for c, seen in zip(ordered, before) if seen < coverage * counts.total()]


def _train_sentencepiece(
    lines: list[str], size: int, transform: str, coverage: float, special: list[str], marks: list[str]
) -> Units:
    import sentencepiece

    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=coverage,
            # The transform has normalised the text. Another normalisation would break the spans.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,
            pad_id=BLANK,
            pad_piece=special[BLANK],
            unk_id=UNKNOWN,
            unk_piece=special[UNKNOWN],
            user_defined_symbols=marks,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise ConfigError(f"sentencepiece cannot learn {size} units from {len(lines)} lines: {e}") from e
    model = buffer.getvalue()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(k) for k in range(processor.vocab_size())]
    return Units("sentencepiece", transform, pieces, model, marks)
