"""What rows were computed from: changed times and audio are refused and named, and only these rows are made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from stillhouse.data.errors import FeatureError, StaleError
from stillhouse.data.features.compute import FeatureFile, FeatureSettings, compute_features
from stillhouse.data.features.provenance import refuse_changed_rows, refuse_other_settings
from stillhouse.data.manifest import Corpus

Make = Callable[..., Corpus]


def changed(corpus: Corpus, number: int, **values: object) -> Corpus:
    utterances = list(corpus.utterances)
    utterances[number] = utterances[number].model_copy(update=values)
    return Corpus(corpus.path, utterances)


def rows(path: Path) -> dict[tuple[str, float], bytes]:
    file = FeatureFile(path).open()
    keys = list(zip(file.row_ids, file.row_speeds.tolist(), strict=True))
    return {(id, s): file.gather([id], s)[0].tobytes() for id, s in keys}


def refused(corpus: Corpus, path: Path, *words: str) -> str:
    with pytest.raises(StaleError) as caught:
        refuse_changed_rows(corpus, FeatureFile(path), corpus.utterances)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"start_s": 0.01, "duration_s": 0.2}, "start_s was 0 and is 0.01, duration_s was 0.67 and is 0.2"),
        ({"duration_s": None}, "duration_s was 0.67 and is not given"),
        ({"channel": 0}, "channel was not given and is 0"),
    ],
)
def test_changed_times_are_named_also_without_the_audio(
    make_corpus: Make, tmp_path: Path, values: dict, said: str
) -> None:
    corpus, path = make_corpus(3), tmp_path / "f.h5"
    compute_features(corpus, path, workers=0)
    assert refuse_changed_rows(corpus, FeatureFile(path), corpus.utterances) == 0
    other = changed(corpus, 1, **values)
    text = refused(other, path, "u001", said, f"corpus features {corpus.path} {path} --redo-changed`")
    assert "u000" not in text
    shutil.rmtree(corpus.path.parent / "audio")
    refused(other, path, said)
    assert refuse_changed_rows(corpus, FeatureFile(path), corpus.utterances) == 3


def test_a_corpus_that_changed_gets_exactly_the_changed_rows(
    make_corpus: Make, tone: Callable[..., Path], tmp_path: Path
) -> None:
    corpus, path = make_corpus(5), tmp_path / "f.h5"
    compute_features(corpus, path, (1.0, 1.1), workers=0)
    before = rows(path)
    tone(corpus.audio_path(corpus.utterances[3]), corpus.utterances[3].duration_s, 999)
    other = changed(corpus, 1, duration_s=0.25)
    swapped = {4: corpus.utterances[0].audio, 0: corpus.utterances[4].audio}
    for number, audio in swapped.items():
        other = changed(other, number, audio=audio, duration_s=corpus.utterances[4 - number].duration_s)
    refused(other, path, "u000, u001, u003, u004", "has changed")
    with pytest.raises(StaleError, match=r"u000, u001, u003, u004.*--redo-changed"):
        compute_features(other, path, (1.0, 1.1), workers=0)
    assert rows(path) == before
    assert compute_features(other, path, (1.0, 1.1), workers=0, redo_changed=True).rows_computed == 8
    after = rows(path)
    assert {id for id, speed in after if after[id, speed] != before[id, speed]} == {"u000", "u001", "u003", "u004"}
    assert refuse_changed_rows(other, FeatureFile(path), other.utterances) == 0
    assert compute_features(other, path, (1.0, 1.1), workers=0, redo_changed=True).rows_computed == 0


def test_one_byte_anywhere_is_found_by_features(make_corpus: Make, tone: Callable[..., Path], tmp_path: Path) -> None:
    corpus, path = make_corpus(2), tmp_path / "f.h5"
    audio = tone(corpus.audio_path(corpus.utterances[0]), 3.0)
    corpus = changed(corpus, 0, duration_s=3.0)
    compute_features(corpus, path, workers=0)
    data = bytearray(audio.read_bytes())
    data[10_001] ^= 64  # between the blocks that a quick look reads
    audio.write_bytes(data)
    with pytest.raises(StaleError, match=r"u000.*another content.*--redo-changed"):
        compute_features(corpus, path, workers=0)


def test_a_touched_or_copied_corpus_is_the_same(make_corpus: Make, tmp_path: Path) -> None:
    corpus, path = make_corpus(3), tmp_path / "f.h5"
    compute_features(corpus, path, workers=0)
    os.utime(corpus.audio_path(corpus.utterances[0]), (1, 1))
    shutil.copytree(corpus.path.parent, tmp_path / "copy")
    for place in (corpus, Corpus(tmp_path / "copy" / "corpus.jsonl", corpus.utterances)):
        assert refuse_changed_rows(place, FeatureFile(path), place.utterances) == 0
        assert compute_features(place, path, workers=0).rows_computed == 0


def test_a_file_without_records_is_read_compared_and_extended(
    make_corpus: Make, tone: Callable[..., Path], tmp_path: Path
) -> None:
    """So files of earlier versions are."""
    corpus, path = make_corpus(3), tmp_path / "f.h5"
    compute_features(Corpus(corpus.path, corpus.utterances[:2]), path, workers=0)
    with h5py.File(path, "r+") as file:
        del file["records"], file.attrs["records_crc32c"]
    assert not FeatureFile(path).open().records["stamp"].any()
    assert refuse_changed_rows(corpus, FeatureFile(path), corpus.utterances) == 0
    refused(changed(corpus, 1, duration_s=0.2), path, "u001", "start, duration or channel changed")
    assert compute_features(corpus, path, workers=0).rows_computed == 1
    assert (FeatureFile(path).open().records["stamp"] != 0).tolist() == [False, False, True]
    tone(corpus.audio_path(corpus.utterances[0]), corpus.utterances[0].duration_s, 999)
    assert compute_features(corpus, path, workers=0, redo_changed=True).rows_computed == 1


def test_damaged_records_are_refused(make_corpus: Make, tmp_path: Path) -> None:
    corpus, path = make_corpus(2), tmp_path / "f.h5"
    compute_features(corpus, path, workers=0)
    with h5py.File(path, "r+") as file:
        values = file["records"][:]
        values["start_s"][1] = 0.5
        file["records"][:] = values
    with pytest.raises(FeatureError, match="damaged"):
        FeatureFile(path).open()


def test_other_settings_are_named_with_the_command(make_corpus: Make, tmp_path: Path) -> None:
    corpus, path = make_corpus(1), tmp_path / "f.h5"
    compute_features(corpus, path, settings=FeatureSettings(rate_hz=8000), workers=0)
    file = FeatureFile(path)
    for settings, fingerprint in ((file.settings, None), (None, file.fingerprint), (None, None), ({"bins": 80}, None)):
        refuse_other_settings(file, settings, fingerprint)
    with pytest.raises(StaleError, match=r"rate_hz is 8000 there and 16000.*`.*--rate 16000 --bins 40`") as caught:
        refuse_other_settings(file, {"method": file.settings["method"], "rate_hz": 16000, "bins": 40}, None)
    assert "method" not in str(caught.value)
    with pytest.raises(StaleError, match="fingerprint"):
        refuse_other_settings(file, None, FeatureSettings().fingerprint)
    longer = changed(corpus, 0, duration_s=0.2)
    refused(longer, path, "--redo-changed --rate 8000`")
    np.testing.assert_array_equal(file.sounds(["u000"]), file.open().audio)
