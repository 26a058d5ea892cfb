"""Read and write hypothesis files: JSON lines with or without references, NIST's trn and ctm, Kaldi's text.

Guarantees: what `stillhouse decode` writes in any format is read back completely. Utterances in which no word was
recognised are included, partial results are not.
Try: `stillhouse score HYP.trn --corpus corpus.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...data.errors import CorpusError
from ...data.files.atomic import write_atomic

REMEDY = "make it with `stillhouse decode`"
NOTHING = ": nothing was heard"  # ends a comment in ctm, whose lines are words
KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".trn": "trn", ".ctm": "ctm", ".text": "text", ".txt": "text"}

Record = tuple[str, str | None, str]  # id, reference if the file has one, hypothesis


def read_hypotheses(path: Path, references: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Return (id, reference, hypothesis) of each utterance of a file, whose name or lines show the format.

    `references` are transcripts by id, for a file without. Raises CorpusError for a line that is no hypothesis, has no
    reference, or is a second one of its utterance.
    """
    try:
        lines = [(n, line) for n, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise CorpusError(f"the file cannot be read: {e}", where=path, remedy=REMEDY) from None
    kind = kind_of(path, [line for _, line in lines])
    parse = {"jsonl": _parse_jsonl, "trn": _parse_trn, "ctm": _parse_ctm, "text": _parse_text}[kind]
    triples: dict[str, tuple[str, str, str]] = {}
    for number, line in lines:
        where = f"{path}:{number}"
        record = parse(line, where)
        if record is None:  # a partial result or a comment
            continue
        id, ref, hyp = record
        if id in triples:
            if kind != "ctm":
                raise CorpusError(f"this is a second hypothesis of {id!r}", where=where)
            hyp, ref = f"{triples[id][2]} {hyp}".strip(), triples[id][1]
        elif ref is None:
            if references is None:
                remedy = "name the manifest that has the transcripts: --corpus corpus.jsonl"
                raise CorpusError("the file has no references to compare with", where=where, remedy=remedy)
            if id not in references:
                raise CorpusError(f"the corpus has no utterance {id!r}", where=where)
            ref = references[id]
        triples[id] = id, ref, hyp
    if not triples:
        raise CorpusError("the file has no hypothesis", where=path, remedy=REMEDY)
    return list(triples.values())


def write_hypotheses(path: Path, triples: Iterable[tuple[str, str, str]]) -> None:
    """Write (id, reference, hypothesis) of each utterance as JSON lines, which `read_hypotheses` reads."""
    lines = [json.dumps({"id": id, "hyp": hyp, "ref": ref}, ensure_ascii=False) + "\n" for id, ref, hyp in triples]
    write_atomic(path, "".join(lines))


def kind_of(path: Path, lines: list[str]) -> str:
    """Return jsonl, trn, ctm or text: by the end of the file's name, or else by its lines."""
    if path.suffix in KINDS:
        return KINDS[path.suffix]
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


def _parse_jsonl(line: str, where: str) -> Record | None:
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not {"id", "hyp"} <= record.keys():
            raise TypeError("it has no id and hyp")
        id, ref, hyp = record["id"], record.get("ref"), record["hyp"]
        if not all(isinstance(value, str) for value in (id, hyp, "" if ref is None else ref)):
            raise TypeError("id, ref and hyp must be text")
    except (ValueError, TypeError, RecursionError) as e:
        expected = '{"id": …, "hyp": …, "ref": …}'
        raise CorpusError(f"this is not a hypothesis: {e}", where=where, expected=expected) from None
    return (id, ref, hyp) if record.get("final", True) else None


def _parse_trn(line: str, where: str) -> Record:
    words, bracket, id = line.strip().removesuffix(")").rpartition("(")
    if not bracket or not line.strip().endswith(")") or not id:
        raise CorpusError("this is not a line of trn", where=where, expected="words (id)")
    return id, None, words.strip()


def _parse_ctm(line: str, where: str) -> Record | None:
    if line.startswith(";;"):
        comment = line[2:].strip()
        return (comment.removesuffix(NOTHING).strip(), None, "") if comment.endswith(NOTHING) else None
    fields = line.split()
    if not _is_ctm(fields):
        expected = "id channel start duration word, and maybe a confidence"
        raise CorpusError("this is not a line of ctm", where=where, expected=expected)
    return fields[0], None, fields[4]


def _parse_text(line: str, where: str) -> Record:
    id, _, words = line.strip().partition(" ")
    return id, None, words.strip()
