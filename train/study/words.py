"""Classes of words whose errors a study shows apart: words of a file, and words that training has not seen.

Guarantees: a class is spelt as the units spell transcripts. An error of a class is a word of the reference that is
substituted or deleted, so insertions are in no class.
Try: `stillhouse study STUDY --table`, with `[words]` in STUDY.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...data.errors import ConfigError
from ...data.files.atomic import read_plain
from ...data.manifest import read_manifest
from ...data.units import load_units
from ..score.alignment import RIGHT, align_words
from .definition import Study

UNSEEN = "unseen"
TAKEN = ("wer", "cer", UNSEEN)  # names that tables use themselves

Holds = Callable[[str], bool]  # whether a word belongs to a class


def word_classes(study: Study) -> dict[str, Holds]:
    """Return the classes of words, by name.

    Raises ConfigError if a file cannot be read or has no words, or if a class has a name that tables use themselves.
    """
    definition, data = study.definition, study.runs[0].config.data
    if not definition.words and not definition.unseen:
        return {}
    units = load_units(data.units)
    classes: dict[str, Holds] = {}
    for name, path in definition.words.items():
        if name in TAKEN:
            raise ConfigError(f"a class of words cannot be named {name}", where=study.path, expected="another name")
        path = study.path.parent / path
        try:
            listed = read_plain(path).decode().split()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"the words {name} cannot be read: {e}", where=path) from None
        if not listed:
            raise ConfigError(
                f"there are no words of the class {name}", where=path, expected="words, with spaces between"
            )
        classes[name] = frozenset(units.normalise(word).text for word in listed).__contains__
    if definition.unseen:
        corpus = read_manifest(data.corpus).select(data.train)
        seen = frozenset(word for u in corpus.utterances for word in units.normalise(u.text).text.split())
        classes[UNSEEN] = lambda word: word not in seen
    return classes


def class_errors(
    references: Sequence[str], hypotheses: Sequence[str], classes: Mapping[str, Holds]
) -> dict[str, np.ndarray]:
    """Return by class, of each utterance, how many reference words are wrong and how many there are, int64 [U, 2]."""
    counts = {name: np.zeros((len(references), 2), np.int64) for name in classes}
    if not classes:  # An alignment takes as long as all else of a table.
        return counts
    for n, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        for pair in align_words(reference, hypothesis):
            for name, holds in classes.items():
                if pair.ref and holds(pair.ref):
                    counts[name][n] += (pair.kind != RIGHT, 1)
    return counts
