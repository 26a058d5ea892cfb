"""Features of audio that is not what the manifest says: half a file, channels that cancel out, other corpora."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.errors import PartialError, StaleError
from stillhouse.data.features.compute import FeatureFile, compute_features
from stillhouse.data.manifest import Corpus, Utterance, read_manifest, write_manifest

Tone = Callable[..., Path]


def corpus_of(folder: Path, *utterances: Utterance) -> Corpus:
    write_manifest(folder / "corpus.jsonl", utterances)
    return read_manifest(folder / "corpus.jsonl")


def test_half_a_file_is_not_used_as_if_it_were_whole(tmp_path: Path, tone: Tone) -> None:
    """An earlier import took the readable length for the length of the file."""
    data = tone(tmp_path / "a.wav", 2.0).read_bytes()
    (tmp_path / "a.wav").write_bytes(data[:32044])
    times = {"inside": (0.0, 0.9), "last": (0.5, 0.5), "whole": (0.0, 1.0), "open": (0.0, None)}
    utterances = [Utterance(id=i, text="x", audio="a.wav", start_s=s, duration_s=d) for i, (s, d) in times.items()]
    with pytest.raises(
        PartialError, match=r"(?s)3 utterances failed.*promises 2\.000 s, and 1\.000 s can be read"
    ) as e:
        compute_features(corpus_of(tmp_path, *utterances), tmp_path / "f.h5", workers=0)
    assert all(f"{id}: " in str(e.value) for id in ("last", "whole", "open"))
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.ids == ["inside"]


def test_both_sides_of_a_call_and_a_mean_that_is_silence(tmp_path: Path) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal((16000, 2))
    soundfile.write(tmp_path / "call.wav", noise, 16000)
    for k in (0, 1):
        soundfile.write(tmp_path / f"{k}.wav", noise[:, k], 16000)
    soundfile.write(tmp_path / "anti.wav", noise[:, :1] * [1, -1], 16000)
    sides = [Utterance(id=f"side-{k}", text="x", audio="call.wav", channel=k) for k in (0, 1)]
    files = [Utterance(id=f"file-{k}", text="x", audio=f"{k}.wav") for k in (0, 1)]
    anti = Utterance(id="anti", text="x", audio="anti.wav")
    with pytest.raises(PartialError, match=r"anti: .*cancel each other out"):
        compute_features(corpus_of(tmp_path, *sides, *files, anti), tmp_path / "f.h5", workers=0)
    with FeatureFile(tmp_path / "f.h5") as file:
        for k in (0, 1):
            side, alone = (file.gather([f"{name}-{k}"])[0] for name in ("side", "file"))
            np.testing.assert_array_equal(side, alone)


def test_two_corpora_of_the_same_ids_do_not_share_a_file(tmp_path: Path, tone: Tone) -> None:
    corpora = []
    for k, name in enumerate(("one", "two")):
        tone(tmp_path / name / "0001.wav", 1.0, 300 + 100 * k)
        corpora.append(corpus_of(tmp_path / name, Utterance(id="0001", text="x", audio="0001.wav")))
    compute_features(corpora[0], tmp_path / "f.h5", workers=0)
    with pytest.raises(StaleError, match="0001"):
        compute_features(corpora[1], tmp_path / "f.h5", workers=0)
