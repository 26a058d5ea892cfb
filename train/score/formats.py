"""Read files of hypotheses and references: JSON lines, NIST's trn, ctm and stm, Kaldi's text, and those of peers.

Guarantees: a line that is none of its format, and a second text of one utterance, are errors that name the line.
Try: `stillhouse score HYP.ctm --reference REF.stm`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...data.errors import CorpusError
from ...data.files.lines import objects_in, read_lines
from ...data.sources.nemo import LineIds
from .listed import is_listed, read_listed

REMEDY = "make it with `stillhouse decode`"
NOTHING = ": nothing was heard"  # ends a comment in ctm, whose lines are words
KINDS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".trn": "trn",
    ".ctm": "ctm",
    ".stm": "stm",
    ".text": "text",
    ".txt": "text",
}
HYPOTHESIS, REFERENCE = ("hyp", "pred_text"), ("ref", "text")  # keys of texts in JSON, ours first and then NeMo's
IGNORED = "ignore_time_segment_in_scoring"
GAPS = ("inter_segment_gap", "excluded_region")  # what stm names as the speaker of a time that does not count
ALTERNATIVES = {"<ALT_BEGIN>": "{", "<ALT>": "/", "<ALT_END>": "}"}


@dataclass(frozen=True)
class TimedWord:
    """A word of an audio file, or a few of them with their alternatives. `middle_s` decides where it belongs."""

    start_s: float
    middle_s: float
    text: str


@dataclass(frozen=True)
class Line:
    """The text of an utterance in a file. `nist`: the text may have alternatives.

    `words` are given where the file has their times. The rest is known of a part of a recording: the names that the
    recording may have, the channel, the times, and whether words in it count.
    """

    id: str
    text: str
    where: str
    reference: str | None = None
    nist: bool = False
    words: list[TimedWord] = field(default_factory=list)
    recordings: tuple[str, ...] = ()
    channel: str | None = None
    begin_s: float = 0.0
    end_s: float = math.inf
    counts: bool = True


def read_file(path: Path, heard: Sequence[str] = HYPOTHESIS) -> list[Line]:
    """Return the utterances of a file. `heard` are the keys of the texts in JSON. See `kind_of` for the format."""
    if not path.exists():
        raise CorpusError("there is no such file", where=path, remedy=REMEDY)
    numbered = [(n, line) for n, line in read_lines(path) if line.strip()]
    kind = kind_of(path, [line for _, line in numbered])
    if kind == "jsonl":
        found = _unique(_objects(path, numbered, heard))
    elif kind == "ctm":
        found = _ctm(path, numbered)
    elif kind == "listed":
        both = read_listed(path, numbered)
        if heard is REFERENCE:
            found = [Line(id, ref, where) for id, ref, _, where in both]
        else:
            found = [Line(id, hyp, where, ref) for id, ref, hyp, where in both]
    else:
        parse = {"trn": _trn, "text": _text, "stm": _stm}[kind]
        comments = kind != "text"
        found = _unique(parse(line, f"{path}:{n}") for n, line in numbered if not (comments and line[:2] == ";;"))
    if not found:
        raise CorpusError("the file has no hypothesis", where=path, remedy=REMEDY)
    return found


def kind_of(path: Path, lines: list[str]) -> str:
    """Return jsonl, trn, ctm, stm, text or listed: by the end of the file's name, or else by its lines.

    `listed` are references and hypotheses under each other, as in icefall's recogs, which end in .txt.
    """
    if KINDS.get(path.suffix.lower(), "text") == "text" and is_listed(lines):
        return "listed"
    if path.suffix.lower() in KINDS:
        return KINDS[path.suffix.lower()]
    content = [line.strip() for line in lines if not line.startswith(";;")]
    if not lines or (content and content[0][0] in "{[" and not content[0].endswith(")")):
        return "jsonl"
    if not content:
        return "ctm"
    if all(line.endswith(")") and "(" in line for line in content):
        return "trn"
    return "ctm" if _is_ctm(content[0].split()) else "text"


def _unique(lines: Iterator[Line]) -> list[Line]:
    found: dict[str, Line] = {}
    for line in lines:
        if (first := found.setdefault(line.id, line)) is not line:
            what = f"this is a second hypothesis of {line.id!r}, after that of {first.where}"
            raise CorpusError(what, where=line.where, remedy="delete one of the two lines")
    return list(found.values())


def _objects(path: Path, lines: list[tuple[int, str]], keys: Sequence[str]) -> Iterator[Line]:
    records = list(objects_in(path, lines))
    ids = LineIds()
    ids.see(path, records)
    for number, record in records:
        where, expected = f"{path}:{number}", '{"id": …, "hyp": …, "ref": …}'
        if isinstance(record, CorpusError):
            why = "it has no id and hyp" if record.what.startswith("JSON, but") else record.what
            raise CorpusError(f"this is not a hypothesis: {why}", where=where, expected=expected)
        if not record.get("final", True):  # a partial result
            continue
        heard = next((key for key in keys if key in record), None)
        id = ids.id(record, path)
        if heard is None or id is None:
            what = "this is not a hypothesis: it has no id and hyp"
            raise CorpusError(what, where=where, expected=expected + ", or NeMo's audio_filepath, pred_text and text")
        hyp, ref = record[heard], record.get("text" if heard == "pred_text" else "ref")
        if not isinstance(hyp, str) or not isinstance(ref, str | None):
            what = "this is not a hypothesis: id, ref and hyp must be text"
            raise CorpusError(what, where=where, expected=expected)
        yield Line(id, hyp, where, ref, words=_timed(record.get("words")))


def _timed(words: Any) -> list[TimedWord]:
    """Return the words of a JSON line with their times, or none of them if one has no time."""
    try:
        return [TimedWord(w["start_s"], (w["start_s"] + w["end_s"]) / 2, w["word"]) for w in words or ()]
    except (TypeError, KeyError):
        return []


def _trn(line: str, where: str) -> Line:
    words, bracket, id = line.strip().removesuffix(")").rpartition("(")
    if not bracket or not line.strip().endswith(")") or not id.strip():
        raise CorpusError("this is not a line of trn", where=where, expected="words (id)")
    return Line(id.strip(), words.strip(), where, nist=True)


def _text(line: str, where: str) -> Line:
    id, *words = line.split(None, 1)
    return Line(id, words[0].strip() if words else "", where)


def _stm(line: str, where: str) -> Line:
    fields = line.split(None, 5)
    try:
        name, channel, speaker, begin, end = fields[:5]
        begin_s, end_s = float(begin), float(end)
        if not 0 <= begin_s <= end_s < math.inf:
            raise ValueError(line)
    except ValueError:
        expected = "file channel speaker begin end words"
        raise CorpusError("this is not a line of stm", where=where, expected=expected) from None
    text = fields[5].strip() if len(fields) > 5 else ""
    if text.startswith("<") and (label := text.split(None, 1)[0]).endswith(">"):
        text = text.removeprefix(label).strip()  # the subset of the segment, as <o,f0,male> or <NA>, also for sclite
    counts = text.lower() != IGNORED and speaker.lower() not in GAPS
    id = f"{name}-{channel}-{round(begin_s * 1000):07d}-{round(end_s * 1000):07d}"
    part = Line(id, text, where, nist=True, recordings=(name,), channel=channel, counts=counts)
    return replace(part, begin_s=begin_s, end_s=end_s)


def _is_ctm(fields: list[str]) -> bool:
    try:
        if fields[2:4] == ["*", "*"]:
            return len(fields) >= 5 and fields[4] in ALTERNATIVES
        return 5 <= len(fields) <= 8 and float(fields[2]) >= 0 and float(fields[3]) >= 0
    except (ValueError, IndexError):
        return False


def _ctm(path: Path, lines: list[tuple[int, str]]) -> list[Line]:
    """Return a line of each audio file and channel, with its words in the order of their times."""
    found: dict[tuple[str, str | None], Line] = {}
    block: list[str] = []  # alternatives that have not ended
    first: TimedWord | None = None  # in them
    for number, line in lines:
        where = f"{path}:{number}"
        if line.startswith(";;"):
            comment = line[2:].strip()
            if comment.endswith(NOTHING):
                id = comment.removesuffix(NOTHING).strip()
                found.setdefault((id, None), Line(id, "", where, nist=True))
            continue
        fields = line.split()
        if not _is_ctm(fields):
            expected = "id channel start duration word, and maybe a confidence"
            raise CorpusError("this is not a line of ctm", where=where, expected=expected)
        own = found.setdefault((fields[0], fields[1]), Line(fields[0], "", where, channel=fields[1], nist=True))
        if fields[2] != "*":
            word = TimedWord(float(fields[2]), float(fields[2]) + float(fields[3]) / 2, fields[4])
            if block:
                first = first or word
                block.append(fields[4])
            else:
                own.words.append(word)
            continue
        block.append(ALTERNATIVES[fields[4]])
        if (len(block) == 1) != (block[-1] == "{"):
            raise CorpusError(
                f"{fields[4]} in the wrong place", where=where, expected="<ALT_BEGIN> … <ALT> … <ALT_END>"
            )
        if block[-1] == "}":
            own.words.append(replace(first or TimedWord(0.0, 0.0, ""), text=" ".join(block)))
            block, first = [], None
    if block:
        raise CorpusError("alternatives without an end", where=path, expected="a line with <ALT_END>")
    for own in found.values():
        own.words.sort(key=lambda word: word.start_s)
    return [replace(own, text=" ".join(word.text for word in own.words)) for own in found.values()]
