"""Back-off n-gram language models in ARPA files, plain or gzipped, read into sorted tables.

Guarantees: an incomplete or inconsistent file is refused, by name and line. Probabilities are those of the file's
back-off model, also where n-grams or their prefixes were pruned.
Try: `stillhouse decode RUN CORPUS FEATURES --beam 8 --lm words.arpa.gz`.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...data.errors import CorpusError
from ...data.files.lines import scan_lines

LN10 = math.log(10)
NEVER = -99 * LN10  # ARPA files write a probability of 0 so.
UNKNOWN = ("<unk>", "<UNK>", "<Unk>")
KENLM_BINARY = "mmap lm http://kheafield.com/code"
_COUNT = re.compile(r"ngram[ \t]+(\d+)[ \t]*=[ \t]*(\d+)[ \t]*$")
_SECTION = re.compile(r"\\(\d+)-grams:[ \t]*$")


class NGram:
    """P(word | the words before it), in natural logarithms. A word is its number in `words`, a context a tuple of such.

    tables[n - 1] holds the n-grams as three arrays. Keys are int64 and ascending: prefix * V + last word, where prefix
    is the row of the first n - 1 words in the table before. The keys of 1-grams are the words. Log-probabilities are
    NaN where only longer n-grams need the prefix. The third array holds back-off weights.
    """

    def __init__(self, words: dict[str, int], tables: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        self.words, self.tables, self.size, self.order = words, list(tables), len(words), len(tables)
        self.unknown = next((words[name] for name in UNKNOWN if name in words), None)
        self.begin, self.end = words.get("<s>"), words.get("</s>")
        known = self.tables[0][1][self.tables[0][1] > 0.99 * NEVER]
        self.floor = float(known.min()) if len(known) else NEVER

    @property
    def start(self) -> tuple[int, ...]:
        """Return the context of a first word."""
        return () if self.begin is None else self.shortened((self.begin,))

    def shortened(self, context: tuple[int, ...]) -> tuple[int, ...]:
        """Return the longest end of `context` whose probabilities can differ from those of its own end."""
        for first in range(max(0, len(context) - self.order + 1), len(context)):
            if self._place(context[first:]) >= 0:
                return context[first:]
        return ()

    def score(self, context: tuple[int, ...], word: int | None) -> float:
        """Return log P(word | context). None is an unknown word, which costs as much as the rarest known one."""
        if word is None:
            return self.floor
        added = 0.0
        for first in range(len(context)):
            place = self._place(context[first:])
            if place < 0:
                continue
            length = len(context) - first
            keys, logp, _ = self.tables[length]
            at = self._find(keys, place * self.size + word)
            if at >= 0 and not math.isnan(logp[at]):
                return max(added + float(logp[at]), NEVER)
            added += float(self.tables[length - 1][2][place])
        return max(added + float(self.tables[0][1][word]), NEVER)

    def row(self, context: tuple[int, ...]) -> np.ndarray:
        """Return float64 [V]: the `score` of every word."""
        scores = self.tables[0][1].copy()
        for length in range(1, len(context) + 1):
            place = self._place(context[len(context) - length :])
            if place < 0:
                continue
            scores += self.tables[length - 1][2][place]
            keys, logp, _ = self.tables[length]
            low, high = np.searchsorted(keys, (place * self.size, (place + 1) * self.size))
            given = ~np.isnan(logp[low:high])
            scores[keys[low:high][given] - place * self.size] = logp[low:high][given]
        return np.maximum(scores, NEVER)

    def _place(self, context: tuple[int, ...]) -> int:
        """Return the row of the n-gram in its table, -1 if it has none."""
        if len(context) >= self.order:
            return -1
        place = context[0]
        for table, word in zip(self.tables[1:], context[1:]):
            place = self._find(table[0], place * self.size + word)
            if place < 0:
                return -1
        return place

    @staticmethod
    def _find(keys: np.ndarray, key: int) -> int:
        at = int(np.searchsorted(keys, key))
        return at if at < len(keys) and keys[at] == key else -1


@dataclass
class _Section:
    """The n-grams of one order as the file lists them."""

    order: int
    grams: array = field(default_factory=lambda: array("i"))
    logp: array = field(default_factory=lambda: array("d"))
    backoff: array = field(default_factory=lambda: array("d"))
    lines: array = field(default_factory=lambda: array("q"))


def read_arpa(path: Path | str) -> NGram:
    """Read an ARPA file. Raises CorpusError, which names the file and the line, if it is damaged."""
    path = Path(path)
    words: dict[str, int] = {}
    sections = _read_sections(path, words)
    grams = [np.array(s.grams, np.int64).reshape(-1, s.order) for s in sections]
    values = [(np.array(s.logp) * LN10, np.array(s.backoff) * LN10) for s in sections]
    tables = _tables(grams, values, len(words), path, sections)
    if tables is None:
        _add_prefixes(grams, values)
        tables = _tables(grams, values, len(words), path, sections)
    assert tables is not None
    return NGram(words, tables)


def _damaged(what: str, where: object, expected: str | None = None) -> CorpusError:
    remedy = "make the file again, as with `lmplz -o 3 < text > lm.arpa`"
    return CorpusError(what, where=where, expected=expected, remedy=remedy)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in scan_lines(path):
        if isinstance(line, CorpusError):
            raise line
        yield number, line.strip(" \t")


def _read_sections(path: Path, words: dict[str, int]) -> list[_Section]:
    lines = _lines(path)
    for _, line in lines:
        if line == "\\data\\":
            break
        if line.startswith(KENLM_BINARY):
            raise CorpusError(
                "the file is a KenLM binary", where=path, remedy="give the ARPA file that it was built from"
            )
    else:
        raise _damaged("the file has no \\data\\ section", path, "an ARPA file")
    counts: list[int] = []
    sections: list[_Section] = []
    where, line = str(path), ""
    for number, line in lines:
        where = f"{path}:{number}"
        if count := _COUNT.match(line):
            if int(count[1]) != len(counts) + 1 or sections:
                raise _damaged(f"the count of {count[1]}-grams is out of order", where)
            counts.append(int(count[2]))
        elif line.startswith("\\") and (line == "\\end\\" or _SECTION.match(line)):
            if sections and len(sections[-1].logp) != (expected := counts[len(sections) - 1]):
                what = f"there are {len(sections[-1].logp)} {len(sections)}-grams before this line"
                raise _damaged(what, where, f"{expected}, as \\data\\ states")
            if line == "\\end\\":
                break
            order = int(line[1:].split("-")[0])
            if order != len(sections) + 1 or order > len(counts):
                next_line = f"\\{len(sections) + 1}-grams:" if len(sections) < len(counts) else "\\end\\"
                raise _damaged(f"the section {line} is out of order", where, next_line)
            sections.append(_Section(order))
        elif sections:
            _parse_entry(line, sections[-1], words, where, number, top=len(sections) == len(counts))
        else:
            raise _damaged(f"{line[:60]!r} is not a count of n-grams", where, "ngram 1=…")
    if line != "\\end\\":
        raise _damaged("the file ends before \\end\\", where)
    if len(sections) < len(counts) or not sections:
        raise _damaged(f"there are no {len(sections) + 1}-grams", where)
    return sections


def _parse_entry(line: str, section: _Section, words: dict[str, int], where: str, number: int, *, top: bool) -> None:
    """Add the n-gram of a line: its log10 probability, its words and maybe its back-off weight."""
    order = section.order
    fields = [f for f in line.replace("\t", " ").split(" ") if f]
    if not order + 1 <= len(fields) <= order + 2:
        expected = f"a log10 probability, {order} words" + ("" if top else " and a back-off weight")
        raise _damaged(f"the line has {len(fields)} fields in the section of {order}-grams", where, expected)
    logp = _number(fields[0], "a log10 probability", where)
    if logp > 1e-4:
        raise _damaged(f"a log10 probability of {fields[0]} is above 0", where)
    backoff = _number(fields[-1], "a back-off weight", where) if len(fields) == order + 2 else 0.0
    if order == 1 and fields[1] in words:
        raise _damaged(f"the 1-gram {fields[1]!r} occurs twice", where)
    if order == 1:
        words[fields[1]] = len(words)
    for word in fields[1 : order + 1]:
        if word not in words:
            raise _damaged(f"{word!r} is not among the 1-grams", where)
        section.grams.append(words[word])
    section.logp.append(min(0.0, logp))
    section.backoff.append(0.0 if top else backoff)
    section.lines.append(number)


def _number(text: str, what: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or value == math.inf or "_" in text:
        raise _damaged(f"{text[:40]!r} is not {what}", where, "a number")
    return value


def _tables(
    grams: Sequence[np.ndarray],
    values: Sequence[tuple[np.ndarray, np.ndarray]],
    size: int,
    path: Path,
    sections: Sequence[_Section],
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None:
    """Return sorted tables, or None if a prefix of an n-gram is no n-gram itself."""
    tables = [(np.arange(size), *values[0])]
    for rows, (logp, backoff), section in zip(grams[1:], values[1:], sections[1:]):
        place = rows[:, 0]
        for column, (keys, _, _) in zip(rows.T[1:-1], tables[1:]):
            prefix = place * size + column
            place = np.searchsorted(keys, prefix)
            if (len(keys) == 0 and len(prefix)) or (keys[np.minimum(place, len(keys) - 1)] != prefix).any():
                return None
        keys = place * size + rows[:, -1]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if len(twice := np.flatnonzero(keys[1:] == keys[:-1])):
            line = section.lines[int(order[twice[0] + 1])]
            raise _damaged(f"the {section.order}-gram of this line occurs twice", f"{path}:{line}")
        tables.append((keys, logp[order], backoff[order]))
    return tables


def _add_prefixes(grams: list[np.ndarray], values: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Add the prefixes that some tools prune, without a probability of their own and with a back-off weight of 1."""
    for n in range(len(grams) - 1, 1, -1):
        known = set(map(bytes, np.ascontiguousarray(grams[n - 1])))
        prefixes = np.unique(grams[n][:, :-1], axis=0)
        absent = prefixes[[bytes(row) not in known for row in prefixes]]
        grams[n - 1] = np.concatenate([grams[n - 1], absent])
        logp, backoff = values[n - 1]
        values[n - 1] = np.r_[logp, np.full(len(absent), np.nan)], np.r_[backoff, np.zeros(len(absent))]
