"""Hypothesis files in: JSON lines with or without references, NIST's trn and ctm, Kaldi's text.

Invariant: what `stillhouse decode` writes in any format is read back whole: an utterance in which nothing was heard,
and no partial result. Exercised by `stillhouse score HYP.trn --corpus corpus.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...data.errors import CorpusError

REMEDY = "make it with `stillhouse decode`"
NOTHING = ": nothing was heard"  # the end of a comment in ctm, whose lines are words


def read_hypotheses(path: Path, references: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """(id, reference, hypothesis) of each utterance of a file; `references` by id, for a file that holds none.

    Raises CorpusError naming the line that is no hypothesis, or has none or a second one of its utterance.
    """
    try:
        lines = [(n, line) for n, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise CorpusError(f"cannot be read: {e}", where=path, remedy=REMEDY) from None
    kind = kind_of(path, [line for _, line in lines])
    reading = {"jsonl": _jsonl, "trn": _trn, "ctm": _ctm, "text": _text}[kind]
    found: dict[str, tuple[str, str, str]] = {}
    for number, id, ref, hyp in reading(lines, path):
        if id in found:
            if kind != "ctm":
                raise CorpusError(f"a second hypothesis of {id!r}", where=f"{path}:{number}")
            hyp, ref = f"{found[id][2]} {hyp}".strip(), found[id][1]
        elif ref is None:
            if references is None:
                raise CorpusError(
                    "no reference to compare with",
                    where=f"{path}:{number}",
                    remedy="name the manifest that has the transcripts: --corpus corpus.jsonl",
                )
            if id not in references:
                raise CorpusError(f"no utterance {id!r} in the corpus", where=f"{path}:{number}")
            ref = references[id]
        found[id] = id, ref, hyp
    if not found:
        raise CorpusError("no hypothesis", where=path, remedy=REMEDY)
    return list(found.values())


def kind_of(path: Path, lines: list[str]) -> str:
    """jsonl, trn, ctm or text: by the file's name, else by its lines."""
    named = {".jsonl": "jsonl", ".json": "jsonl", ".trn": "trn", ".ctm": "ctm", ".text": "text", ".txt": "text"}
    if path.suffix in named:
        return named[path.suffix]
    first = next((line.strip() for line in lines if not line.startswith(";;")), ";;")
    if first.startswith("{") or not lines:
        return "jsonl"
    if all(line.rstrip().endswith(")") and "(" in line for line in lines):
        return "trn"
    return "ctm" if first == ";;" or _is_ctm(first.split()) else "text"


def _is_ctm(fields: list[str]) -> bool:
    try:
        return len(fields) in (5, 6) and float(fields[2]) >= 0 and float(fields[3]) >= 0
    except ValueError:
        return False


Lines = list[tuple[int, str]]
Found = Iterator[tuple[int, str, str | None, str]]  # line, id, reference or None, hypothesis


def _jsonl(lines: Lines, path: Path) -> Found:
    for number, line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"id", "hyp"} <= record.keys():
                raise TypeError("it has no id and hyp")
            id, ref, hyp = record["id"], record.get("ref"), record["hyp"]
            if not all(isinstance(value, str) for value in (id, hyp, "" if ref is None else ref)):
                raise TypeError("id, ref and hyp must be text")
        except (ValueError, TypeError, RecursionError) as e:
            raise CorpusError(
                f"not a hypothesis: {e}", where=f"{path}:{number}", expected='{"id": …, "hyp": …, "ref": …}'
            ) from None
        if record.get("final", True):
            yield number, id, ref, hyp


def _trn(lines: Lines, path: Path) -> Found:
    for number, line in lines:
        words, bracket, id = line.strip().removesuffix(")").rpartition("(")
        if not bracket or not line.strip().endswith(")") or not id:
            raise CorpusError("not a line of trn", where=f"{path}:{number}", expected="words (id)")
        yield number, id, None, words.strip()


def _ctm(lines: Lines, path: Path) -> Found:
    for number, line in lines:
        if line.startswith(";;"):
            if line.rstrip().endswith(NOTHING):
                yield number, line.strip()[2:].removesuffix(NOTHING).strip(), None, ""
            continue
        fields = line.split()
        if not _is_ctm(fields):
            raise CorpusError(
                "not a line of ctm",
                where=f"{path}:{number}",
                expected="id channel start duration word, and maybe a confidence",
            )
        yield number, fields[0], None, fields[4]


def _text(lines: Lines, path: Path) -> Found:
    for number, line in lines:
        id, _, words = line.strip().partition(" ")
        yield number, id, None, words.strip()
