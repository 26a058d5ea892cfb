"""Classes of words whose errors a study shows apart: words of a file, and words that training has not seen.

Guarantees: a class is spelt as the units spell transcripts. An error of a class is a word of the reference that is
substituted or deleted, so insertions are in no class.
Try: `stillhouse study STUDY --table`, with `[words]` in STUDY.toml.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...data.errors import ConfigError
from ...data.files.atomic import read_plain
from ...data.manifest import read_manifest
from ...data.units import load_units
from ..score.alignment import RIGHT, align_words
from .definition import Study

UNSEEN = "unseen"


def word_classes(study: Study) -> dict[str, frozenset[str]]:
    """Return the words of each class. `unseen` holds the words of training, and the class is what it does not hold.

    Raises ConfigError if a file cannot be read, or has no words.
    """
    definition, data = study.definition, study.runs[0].config.data
    if not definition.words and not definition.unseen:
        return {}
    units = load_units(data.units)
    classes: dict[str, frozenset[str]] = {}
    for name, path in definition.words.items():
        path = study.path.parent / path
        try:
            words = read_plain(path).decode().split()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"the words {name} cannot be read: {e}", where=path) from None
        classes[name] = frozenset(units.normalise(word).text for word in words)
        if not classes[name]:
            raise ConfigError(
                f"there are no words of the class {name}", where=path, expected="words, with spaces between"
            )
    if definition.unseen:
        corpus = read_manifest(data.corpus).select(data.train)
        classes[UNSEEN] = frozenset(word for u in corpus.utterances for word in units.normalise(u.text).text.split())
    return classes


def class_errors(
    references: Sequence[str], hypotheses: Sequence[str], classes: Mapping[str, frozenset[str]]
) -> dict[str, np.ndarray]:
    """Return by class, of each utterance, how many reference words are wrong and how many there are, int64 [U, 2]."""
    counts = {name: np.zeros((len(references), 2), np.int64) for name in classes}
    for n, (reference, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        for pair in align_words(reference, hypothesis):
            for name, words in classes.items():
                if pair.ref and (pair.ref in words) != (name == UNSEEN):
                    counts[name][n] += (pair.kind != RIGHT, 1)
    return counts
