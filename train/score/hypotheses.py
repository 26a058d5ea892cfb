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
from .formats import read_file


def read_hypotheses(path: Path, references: Mapping[str, str] | None = None) -> list[tuple[str, str, str]]:
    """Return (id, reference, hypothesis) of each utterance of a file, whose name or lines show the format.

    `references` are transcripts by id, for a file without. Raises CorpusError for a line that is no hypothesis, has no
    reference, or is a second one of its utterance.
    """
    triples = []
    for line in read_file(path):
        ref = line.reference
        if ref is None:
            if references is None:
                raise no_references(line.where)
            if line.id not in references:
                raise CorpusError(f"the corpus has no utterance {line.id!r}", where=line.where)
            ref = references[line.id]
        triples.append((line.id, ref, line.text))
    return triples


def no_references(where: object) -> CorpusError:
    """Return the error of a file without transcripts."""
    remedy = "name the manifest that has the transcripts: --corpus corpus.jsonl, or another file with --reference"
    return CorpusError("the file has no references to compare with", where=where, remedy=remedy)


def write_hypotheses(path: Path, triples: Iterable[tuple[str, str, str]]) -> None:
    """Write (id, reference, hypothesis) of each utterance as JSON lines, which `read_hypotheses` reads."""
    lines = [json.dumps({"id": id, "hyp": hyp, "ref": ref}, ensure_ascii=False) + "\n" for id, ref, hyp in triples]
    write_atomic(path, "".join(lines))
