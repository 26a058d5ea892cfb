"""Findings about transcripts as a whole: marks that are no words, and differences that nobody sees.

Guarantees: each form of mark and each invisible character is one finding, with its count, examples and first place.
Try: `stillhouse corpus check corpus.jsonl --no-audio`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..text import INVISIBLE, MARK

# U+3000 is the usual space of Japanese. A blank transcript has its own finding.
SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE")  # whose letters look alike
FORMS = ("[[", "((", "++", "<", "[", "(", "{", "%", "!", "*")
REMEDY = (
    "drop them with `stillhouse corpus tokenizer --marks drop`, or make each a unit with --marks keep, "
    "and accept them here with --ignore mark"
)
COMPOSE = "correct the source, or add nfc to the --transform of `corpus tokenizer` and `extract`"


@dataclass
class _Seen:
    where: str
    id: str
    utterances: int = 0
    what: Counter[str] = field(default_factory=Counter)

    def counted(self, name: str) -> str:
        total, more = sum(self.what.values()), len(self.what) - 5
        examples = ", ".join(f"{text!r} ({n})" for text, n in self.what.most_common(5))
        examples += f" and {more} more" if more > 0 else ""
        return f"{total} {name} in {self.utterances} transcripts, for example {examples}"


def text_findings(texts: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (kind, where, id, what, remedy) of the transcripts, given as (where, id, text)."""
    seen: dict[tuple[str, str], _Seen] = {}
    composed: tuple[str, str] | None = None  # the first word with a composed letter, and its place
    for where, id, text in texts:
        for key, words in _marks_and_signs(text).items():
            own = seen.setdefault(key, _Seen(where, id))
            own.utterances += 1
            own.what.update(words)
        if composed is None and not text.isascii():
            composed = next(((w, where) for w in text.split() if unicodedata.normalize("NFD", w) != w), None)
    for (kind, name), found in sorted(seen.items()):
        if kind == "mark":
            yield kind, found.where, found.id, found.counted(f"marks like {name}…"), REMEDY
        elif kind == "invisible":
            yield kind, found.where, found.id, found.counted(name), "delete them, or replace them by plain spaces"
        elif kind == "script":
            yield kind, found.where, found.id, found.counted("words that mix alphabets"), "write each in one alphabet"
        elif composed is not None:
            what = found.counted("words with decomposed letters") + f", and others are composed, as at {composed[1]}"
            yield kind, found.where, found.id, what, COMPOSE


def _marks_and_signs(text: str) -> dict[tuple[str, str], list[str]]:
    """Return {(kind, name): examples} of one transcript."""
    found: dict[tuple[str, str], list[str]] = {}
    for match in MARK.finditer(text):
        form = next(form for form in FORMS if match[0].startswith(form))
        found.setdefault(("mark", form), []).append(match[0])
    if text.isascii() or not text.strip():
        return found
    for match in (*INVISIBLE.finditer(text), *SPACES.finditer(text)):
        name = f"characters U+{ord(match[0]):04X} ({unicodedata.name(match[0], 'without a name')})"
        around = text[max(0, match.start() - 8) : match.end() + 8]
        if match[0] != "\ufeff":  # a control character of its own finding
            found.setdefault(("invisible", name), []).append(around)
    for word in text.split():
        if not word.isascii():
            if unicodedata.normalize("NFC", word) != word:
                found.setdefault(("unicode", ""), []).append(word)
            letters = [unicodedata.name(c, "").split(" ")[0] for c in word if c.isalpha()]
            if len({name for name in letters if name in SCRIPTS}) > 1:
                found.setdefault(("script", ""), []).append(word)
    return found
