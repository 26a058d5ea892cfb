"""Decide how references and hypotheses are normalised before they are compared.

Guarantees: both texts pass the same transforms, whatever the format of their files. Invisible characters and the two
ways to write an accent in Unicode never make a difference.
Try: `stillhouse score HYP --transform lower+no_punct`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ...data.text import APOSTROPHES, INVISIBLE, MARK, check_transform
from ...data.text import transform as transformed
from ...data.units import load_units

AUTO = "auto"
ONE_SIDED = 10  # A mark that is so many times as frequent on one side is no property of the other side's texts.
_INSIDE = re.compile(rf"(?<=\w)[{APOSTROPHES}](?=\w)")


def resolve_transform(name: str) -> str:
    """Return the transforms that `name` stands for: transforms themselves, or those of a run's or units' folder.

    Raises ConfigError for an unknown name.
    """
    folder = next((f for f in (Path(name), Path(name, "units")) if (f / "units.json").exists()), None)
    return load_units(folder).transform if folder is not None else check_transform(name)


def one_sided(references: Sequence[str], hypotheses: Sequence[str]) -> str:
    """Return the transforms that remove what only one of two lists of texts has, or "none".

    They fold the case if only one side has upper-case (or lower-case) letters, and drop punctuation if only one side
    has any. A tenth of the share of the other side counts as none. Marks such as `<unk>` are no punctuation.
    """
    sides = [
        [unicodedata.normalize("NFC", MARK.sub(" ", text)) for text in texts] for texts in (references, hypotheses)
    ]
    steps = []
    if _one_sided(sides, _has_upper) or _one_sided(sides, _has_lower):
        steps.append("lower")
    if _one_sided(sides, _punctuated):
        steps += ["no_punct", "squeeze"]
    return "+".join(steps) or "none"


def normaliser(name: str) -> Callable[[str], str]:
    """Return what normalises a text by transforms, after invisible characters are dropped and accents composed."""

    def normalise(text: str) -> str:
        return transformed(unicodedata.normalize("NFC", INVISIBLE.sub("", text)), name).text

    return normalise


def _one_sided(sides: Iterable[Sequence[str]], has: Callable[[str], bool]) -> bool:
    """Return whether the share of the words that `has` is true of is much larger in one of two lists of texts."""
    shares = []
    for texts in sides:
        words = [word for text in texts for word in text.split()]
        if not words:
            return False
        shares.append(sum(map(has, words)) / len(words))
    return max(shares) > ONE_SIDED * min(shares)


def without_notation(text: str) -> str:
    """Return a text of NIST's formats without its marks of alternatives and optional words."""
    return re.sub(r"[{}()]|(?<!\S)[/@](?!\S)|(?<=\()%", " ", text)


def _has_upper(word: str) -> bool:
    return word != word.lower()


def _has_lower(word: str) -> bool:
    return word != word.upper()


def _punctuated(word: str) -> bool:
    return any(unicodedata.category(c)[0] in "PS" for c in _INSIDE.sub("", word))
