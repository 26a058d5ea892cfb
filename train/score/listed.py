"""Read files that list a reference and a hypothesis under each other: icefall's recogs and Kaldi's per_utt.

Guarantees: an utterance that lacks one of both is an error that names its line. No list is evaluated as code.
Try: `stillhouse score recogs-test-clean.txt`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

from ...data.errors import CorpusError

RECOGS = re.compile(r"(?P<id>\S.*?):?\s+(?P<side>ref|hyp|timestamp_\w+)=(?P<words>\[.*\])\s*")
PER_UTT = re.compile(r"(?P<id>\S+)\s+(?P<side>ref|hyp|op|#csid)(?:\s+(?P<words>.*))?")
NO_WORD = re.compile(r"\*+|<eps>")  # what Kaldi writes in the place of a deleted or inserted word


def is_listed(lines: Sequence[str]) -> bool:
    """Return whether all lines are those of icefall's recogs, or all of Kaldi's per_utt."""
    if len(lines) < 2:
        return False
    if all(RECOGS.fullmatch(line) for line in lines):
        return True
    matches = [PER_UTT.fullmatch(line.strip()) for line in lines]
    return all(matches) and {"ref", "hyp"} <= {match["side"] for match in matches if match}


def read_listed(path: object, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (id, reference, hypothesis, place) of each utterance of numbered lines, in the order of the file."""
    sides: dict[str, dict[str, str]] = {}
    places: dict[str, str] = {}
    for number, line in lines:
        where = f"{path}:{number}"
        recogs = RECOGS.fullmatch(line)
        match = recogs or PER_UTT.fullmatch(line.strip())
        assert match is not None
        if match["side"] not in ("ref", "hyp"):
            continue
        own = sides.setdefault(match["id"], {})
        places.setdefault(match["id"], where)
        if match["side"] in own:
            what = f"this is a second {match['side']} of {match['id']!r}, after that of {places[match['id']]}"
            raise CorpusError(what, where=where, remedy="delete one of the two utterances")
        words = match["words"] or ""
        own[match["side"]] = _list(words, where) if recogs else " ".join(w for w in words.split() if not _absent(w))
    for id, own in sides.items():
        for side in ("ref", "hyp"):
            if side not in own:
                raise CorpusError(f"{id} has no {side}", where=places[id], expected="a line with ref and one with hyp")
        yield id, own["ref"], own["hyp"], places[id]


def _absent(word: str) -> bool:
    return NO_WORD.fullmatch(word) is not None


def _list(text: str, where: str) -> str:
    try:
        words = ast.literal_eval(text)
        if all(isinstance(word, str) for word in words):
            return " ".join(words)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    raise CorpusError("the words are no list of texts", where=where, expected="ref=['a', 'b'] or hyp=['a', 'b']")
