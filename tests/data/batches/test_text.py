"""Batches of text: their units, what is left out, and that the units of a whole corpus are not kept in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stillhouse.data.batches.loader import BatchLoader
from stillhouse.data.batches.sampler import BatchPlan
from stillhouse.data.batches.text import TextLoader
from stillhouse.data.errors import CorpusError
from stillhouse.data.features.compute import FeatureFile
from stillhouse.data.manifest import Corpus, Utterance, read_manifest
from stillhouse.data.units import UNKNOWN, Units, load_units, train_units

UNITS = train_units(["ab ba"], "characters", transform="lower+squeeze")


def corpus(*texts: str) -> Corpus:
    return Corpus(Path("corpus.jsonl"), [Utterance(id=f"t{k}", text=text) for k, text in enumerate(texts)], Path())


def test_a_batch_has_the_units_of_its_texts_which_are_made_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, asked, read = Units.encode, [], []
    monkeypatch.setattr(Units, "encode", lambda self, text: asked.append(text) or encode(self, text))
    reader = SimpleNamespace(read=lambda *parts, step: read.append(parts))
    loader = TextLoader(corpus("AB  b", "", "a7", "b", "ab " * 9), [], UNITS, max_units=9, targets={"lm": reader})
    assert loader.lengths.tolist() == [4, 1] and not asked
    assert loader.left_out == {
        "with audio": [], "empty": ["t1"], "with symbols that the units lack": ["t2"], "longer than 9 units": ["t4"]
    }  # fmt: skip
    plan = BatchPlan(np.array([1, 0]), np.zeros(2, np.int64), 0)
    batch = loader.load(plan)
    assert batch.ids == ["t3", "t0"] and asked == ["b", "AB  b"] and batch.target_lengths.tolist() == [1, 4]
    assert ["".join(UNITS.pieces[k] for k in row if k) for row in batch.targets.tolist()] == ["b", "ab▁b"]
    ((ids, texts, spans),) = read
    assert (ids, texts) == (["t3", "t0"], ["b", "AB  b"]) and spans[1].tolist() == [[0, 1], [1, 2], [2, 4], [4, 5]]
    loader.targets = {}  # Spans are for targets alone.
    assert torch.equal(loader.load(plan).targets, batch.targets) and len(asked) == 2


@pytest.mark.parametrize(
    ("texts", "remedy"),
    [
        (("7 7", "é", "ab ab ab ab"), "make units of these texts, too"),
        (("ab ab ab ab", "ba " * 5, "é"), "raise text.max_units"),
        (("", " "), "corpus import text TEXTS"),
    ],
)
def test_the_remedy_is_that_of_most_texts(texts: tuple[str, ...], remedy: str) -> None:
    with pytest.raises(CorpusError, match=f"none of the {len(texts)} utterances is a text.*") as e:
        TextLoader(corpus(*texts), [], UNITS, max_units=9)
    assert remedy in str(e.value)


def test_speech_with_unknown_symbols_stays_and_is_named(tones: Path) -> None:
    whole = read_manifest(tones / "corpus.jsonl").select("train")
    parts = whole, FeatureFile(tones / "features.h5"), load_units(tones / "units")
    assert BatchLoader(*parts).without == "left out: none"
    first, second, *others = whole.utterances
    changed = [first.model_copy(update={"text": "é 7"}), second.model_copy(update={"text": " "}), *others]
    loader = BatchLoader(Corpus(whole.path, changed, whole.root), *parts[1:])
    assert UNKNOWN in loader.encoded[0].ids
    expected = f"left out: 1 empty text; 1 learn symbols that the units lack as <unk>: {first.id}"
    assert loader.without == expected
