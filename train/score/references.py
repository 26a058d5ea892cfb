"""Bring hypotheses and references together: by id, by times, or line by line.

Guarantees: a hypothesis without a reference is an error, and a reference without a hypothesis is listed. A word with a
time belongs to the part of the recording that its middle is in, as in NIST's sclite, or else to the next part.
Try: `stillhouse score HYP.ctm --reference REF.stm`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...data.audio.channels import ChannelNames
from ...data.errors import AudioError, CorpusError, UsageError, first_few
from ...data.files.lines import headed_by_ids, read_lines
from ...data.manifest import Corpus
from .formats import REFERENCE, Line, kind_of, read_file
from .hypotheses import no_references

Sides = dict["str | None", "str | int | None"]


@dataclass(frozen=True)
class Pair:
    """A reference and the text that was recognised in its place.

    `nist`: the hypothesis may have alternatives. `own`: the reference stands in the file of the hypothesis.
    """

    reference: Line
    hypothesis: str
    nist: bool = False
    own: bool = False


@dataclass
class Paired:
    """The pairs of a set in the order of the hypotheses, then the references without one. Notes say what was done."""

    pairs: list[Pair]
    missing: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def manifest_references(corpus: Corpus) -> list[Line]:
    """Return the transcripts of a manifest. A session names a recording if all of it lies in one audio file."""
    parts: dict[str, set[tuple]] = defaultdict(set)
    starts: dict[str, list[float]] = defaultdict(list)
    for u in corpus.utterances:
        if u.session is not None:
            parts[u.session].add((u.audio, u.channel))
            starts[u.session].append(u.start_s)
    one = {s for s, files in parts.items() if len(files) == 1 and len(set(starts[s])) == len(starts[s])}
    lines = []
    for u in corpus.utterances:
        names = {u.session} & one if u.session is not None else set()
        names |= {os.path.splitext(os.path.basename(u.audio))[0]} if u.audio is not None else set()
        end_s = u.start_s + u.duration_s if u.duration_s is not None else float("inf")
        where = f"{corpus.path}: {u.id}"
        channel = None if u.channel is None else "ABCD"[u.channel] if u.channel < 4 else str(u.channel)
        line = Line(u.id, u.text, where, recordings=tuple(names), channel=channel)
        lines.append(replace(line, begin_s=u.start_s, end_s=end_s))
    return lines


def read_pair(hypotheses: Path, reference: Path, pairing: str | None = None) -> tuple[list[Line], list[Line], str]:
    """Return hypotheses and references of two files, and how their lines belong together: by "ids" or by "lines".

    Text files whose lines do not all start with an id belong together line by line, unless `pairing` says otherwise.
    """
    kinds, texts = [], []
    for path in (hypotheses, reference):
        if not path.exists():
            raise CorpusError("there is no such file", where=path)
        texts.append(read_lines(path))
        kinds.append(kind_of(path, [line for _, line in texts[-1] if line.strip()]))
    if pairing == "lines" and kinds != ["text", "text"]:
        raise UsageError(f"{kinds[0]} and {kinds[1]} are not paired by lines", expected="two files of plain text")
    if kinds == ["text", "text"] and pairing is None:
        headed = [headed_by_ids(line for _, line in lines) for lines in texts]
        pairing = "ids" if all(headed) else "lines"
        if any(headed) and not all(headed):
            bare = (hypotheses, reference)[headed.index(False)]
            what = "the lines of only one of the two files seem to start with ids"
            raise UsageError(what, where=bare, remedy="say which it is: --pair ids or --pair lines")
    if pairing != "lines":
        return read_file(hypotheses), read_file(reference, REFERENCE), "ids"
    if len(texts[0]) != len(texts[1]):
        what = f"{len(texts[0])} lines do not pair with the {len(texts[1])} of {reference}"
        remedy = "give both files the same lines, or start each line with its id"
        raise CorpusError(what, where=hypotheses, remedy=remedy)
    if not any(line for _, line in texts[0]):
        raise CorpusError("the file has no hypothesis", where=hypotheses)
    hyps, refs = (
        [Line(f"line {n}", line.strip(), f"{path}:{n}") for n, line in lines]
        for path, lines in zip((hypotheses, reference), texts, strict=True)
    )
    return hyps, refs, "lines"


def pair_own(hypotheses: Sequence[Line]) -> Paired:
    """Pair hypotheses with the references that stand beside them. Raises CorpusError if one has none."""
    for line in hypotheses:
        if line.reference is None:
            raise no_references(line.where)
    return Paired([_pair(line, Line(line.id, "", line.where)) for line in hypotheses])


def _pair(line: Line, reference: Line) -> Pair:
    """Pair a hypothesis with its reference. If that is empty, the one beside the hypothesis takes its place."""
    own = line.reference if not reference.text.strip() else None
    return Pair(reference if own is None else replace(reference, text=own), line.text, line.nist, own is not None)


def pair_lines(hypotheses: Sequence[Line], references: Sequence[Line], source: object) -> Paired:
    """Pair hypotheses with the references of `source`, by id, or by times where an id is that of a recording.

    Raises CorpusError for a hypothesis without a reference, or with two of the same id on two channels.
    """
    by_id = {line.id: line for line in references if line.counts}
    recordings: dict[str, list[Line]] = defaultdict(list)
    for line in references:
        for name in line.recordings:
            recordings[name].append(line)
    unknown = [line for line in hypotheses if line.id not in by_id]
    if all(line.id in recordings for line in unknown) and len(unknown) == len(hypotheses):
        return _by_times(hypotheses, references, recordings)
    if unknown:
        what = f"the corpus has no utterance {unknown[0].id!r}"
        what += f", and {len(unknown) - 1} more hypotheses have no reference" if len(unknown) > 1 else ""
        raise CorpusError(what, where=unknown[0].where, expected=f"ids of {source}, for example {references[0].id}")
    pairs: dict[str, Pair] = {}
    for line in hypotheses:
        if line.id in pairs:
            what = f"{line.id} has words on two channels, and its reference has one"
            raise CorpusError(what, where=line.where, remedy="give each channel its own id")
        pairs[line.id] = _pair(line, by_id[line.id])
    return Paired(list(pairs.values()), [line for id, line in by_id.items() if id not in pairs])


def _by_times(hypotheses: Sequence[Line], references: Sequence[Line], recordings: dict[str, list[Line]]) -> Paired:
    words: dict[str, list[str]] = {}  # of each reference
    nist = any(line.nist for line in hypotheses)
    outside = ignored = 0
    for line in hypotheses:
        parts = _parts(line, hypotheses, recordings[line.id])
        for part in parts:
            words.setdefault(part.id, [])
        if line.text and not line.words:
            if len(parts) > 1:
                what = f"{line.id!r} is a whole recording of {len(parts)} references, and its words have no times"
                raise CorpusError(what, where=line.where, expected="ctm, or JSON lines with words")
            words[parts[0].id].append(line.text)
        for word in line.words:
            inside = [p for p in parts if p.begin_s <= word.middle_s < p.end_s]
            if not inside:
                outside += 1
                inside = [p for p in parts if p.begin_s > word.middle_s and p.counts][:1]
                inside = inside or [p for p in parts if p.counts][-1:]
            if not inside or not inside[0].counts:
                ignored += 1
                continue
            words[inside[0].id].append(word.text)
    notes = ["words are assigned to references by their times, because the ids are those of recordings"]
    if outside:
        notes.append(f"{outside} words are outside of all references and count in the next one")
    if ignored:
        notes.append(f"{ignored} words are in times that do not count")
    counting = [line for line in references if line.counts]
    pairs = [Pair(line, " ".join(words[line.id]), nist) for line in counting if line.id in words]
    return Paired(pairs, [line for line in counting if line.id not in words], notes)


def _parts(line: Line, hypotheses: Sequence[Line], parts: list[Line]) -> list[Line]:
    """Return the parts of a recording that are on the channel of a hypothesis, by time."""
    channels = {part.channel for part in parts}
    own = {other.channel for other in hypotheses if other.id == line.id}
    if len(channels) > 1 or len(own) > 1:
        sides = _sides(channels, own)
        parts = [part for part in parts if sides is not None and sides[0][part.channel] == sides[1][line.channel]]
        if not parts:
            expected = f"one of {first_few(sorted(map(str, channels)))}"
            raise CorpusError(f"{line.id} has no channel {line.channel}", where=line.where, expected=expected)
    return sorted(parts, key=lambda part: part.begin_s)


def _sides(channels: set[str | None], own: set[str | None]) -> tuple[Sides, Sides] | None:
    """Return {channel: what it is} of references and hypotheses, which may call a side A or 1.

    None: they do not fit.
    """
    if channels == {None}:
        return None
    if own <= channels:
        return {name: name for name in channels}, {name: name for name in own}
    many = max(2, len(channels))
    try:
        theirs, ours = (ChannelNames(name or "" for name in names) for names in (channels, own))
        return {c: theirs.channel(c, many) for c in channels}, {c: ours.channel(c, many) for c in own}
    except AudioError:
        return None
