"""Noisy copies in a feature file: against a slow mix, resumed, added to, and read in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio.fbank import fbank
from stillhouse.data.audio.noise import NoiseRecipe, find_noise
from stillhouse.data.audio.read import change_speed, read_audio
from stillhouse.data.batches.sampler import BatchSampler
from stillhouse.data.errors import FeatureError, StaleError
from stillhouse.data.features.compute import FeatureFile, compute_features
from stillhouse.data.features.settings import Variant
from stillhouse.data.manifest import Corpus

Make = Callable[..., Corpus]
SPEEDS = (0.9, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for k in range(3):
        soundfile.write(tmp_path / f"noise/{k}.wav", 0.1 * rng.standard_normal(3000 * (k + 1)), 16000)
    return tmp_path / "noise"


def recipe(folder: Path, copies: int = 2, snr: tuple[float, float] = (5, 20)) -> NoiseRecipe:
    return find_noise(folder, None, snr, copies)


def test_rows_are_fbank_of_the_mix_whoever_computes_them(make_corpus: Make, folder: Path, tmp_path: Path) -> None:
    corpus, noise = make_corpus(5), recipe(folder)
    for workers in (0, 2):
        path = tmp_path / f"{workers}.h5"
        report = compute_features(corpus, path, SPEEDS, noise=noise, workers=workers, part_s=1.0)
        assert report.rows_computed == 5 * 2 * 3
        file = FeatureFile(path)
        assert file.speeds == [0.9, 1.0] and file.copies == 2 and file.noise == noise.facts
        assert file.damaged_rows() == []
        for u in corpus.utterances:
            clean = read_audio(corpus.audio_path(u))
            for speed in SPEEDS:
                heard = change_speed(clean, speed)
                for copy in range(3):
                    mixed = noise.applied(heard, 16000, f"{u.id} {Variant(speed, copy)}") if copy else heard
                    rows, _ = file.gather([u.id], speed, copy)
                    np.testing.assert_allclose(rows, fbank(mixed).astype(np.float16), atol=1e-2)
                    if workers == 0:
                        assert np.array_equal(rows, fbank(mixed).astype(np.float16))
        rows = [file.gather(["u001"], 1.0, copy)[0] for copy in range(3)]
        assert all(np.abs(rows[a].astype(float) - rows[b]).mean() > 0.3 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_copies_are_added_and_other_noise_is_refused(make_corpus: Make, folder: Path, tmp_path: Path) -> None:
    corpus, path = make_corpus(3), tmp_path / "f.h5"
    compute_features(corpus, path, SPEEDS, workers=0)
    assert FeatureFile(path).copies == 0 and FeatureFile(path).noise is None
    before = path.read_bytes()
    assert compute_features(corpus, path, SPEEDS, noise=recipe(folder, 1), workers=0).rows_computed == 6
    one = FeatureFile(path).gather(["u002"], 0.9, 1)[0]
    assert compute_features(corpus, path, SPEEDS, noise=recipe(folder, 3), workers=0).rows_computed == 12
    assert compute_features(corpus, path, SPEEDS, workers=0).rows_computed == 0
    file = FeatureFile(path)
    assert file.copies == 3 and np.array_equal(file.gather(["u002"], 0.9, 1)[0], one)
    with pytest.raises(FeatureError, match=r"u000 at speed 1, copy 4.*3 noisy copies.*--copies"):
        file.gather(["u000"], 1.0, 4)
    with pytest.raises(StaleError, match=r"snr_db is \[5\.0, 20\.0\] there and \[0\.0, 20\.0\] here"):
        compute_features(corpus, path, noise=recipe(folder, 3, (0, 20)), workers=0)
    (folder / "more.wav").write_bytes((folder / "0.wav").read_bytes())
    with pytest.raises(StaleError, match="noises is 3 there and 4 here"):
        compute_features(corpus, path, noise=recipe(folder, 4), workers=0)
    compute_features(corpus, tmp_path / "plain.h5", SPEEDS, workers=0)
    assert (tmp_path / "plain.h5").read_bytes() == before  # Files without noise are as they have always been.


def test_changed_audio_is_computed_again_with_the_same_noise(make_corpus: Make, folder: Path, tmp_path: Path) -> None:
    corpus, path = make_corpus(2), tmp_path / "f.h5"
    compute_features(corpus, path, noise=recipe(folder, 1), workers=0)
    audio = corpus.audio_path(corpus.utterances[0])
    samples, hz = soundfile.read(audio)
    soundfile.write(audio, 0.5 * samples[::-1], hz)
    with pytest.raises(StaleError, match="give the same --noise"):
        compute_features(corpus, path, workers=0, redo_changed=True)
    assert compute_features(corpus, path, noise=recipe(folder, 1), workers=0, redo_changed=True).rows_computed == 2


def test_a_broken_file_of_noise_costs_no_row_that_is_right(make_corpus: Make, folder: Path, tmp_path: Path) -> None:
    from stillhouse.data.errors import PartialError

    (folder / "broken.wav").write_bytes(b"RIFF....")
    corpus, path = make_corpus(6), tmp_path / "f.h5"
    with pytest.raises(PartialError, match=r"broken\.wav"):
        compute_features(corpus, path, noise=recipe(folder, 1), workers=0)
    assert FeatureFile(path).damaged_rows() == []


def test_a_share_of_each_epoch_is_noisy_and_the_rest_of_the_plan_stays() -> None:
    frames = np.random.default_rng(1).integers(50, 100, size=(400, 2))
    plain = BatchSampler(frames, max_frames=1000, seed=3)
    noisy = BatchSampler(frames, max_frames=1000, seed=3, noise=0.75, copies=3)
    for epoch in range(2):
        drawn = np.zeros(400, np.int64)
        for a, b in zip(plain.epoch(epoch), noisy.epoch(epoch), strict=True):
            assert a.copies is None and b.copies is not None
            assert np.array_equal(a.indices, b.indices) and np.array_equal(a.speeds, b.speeds)
            drawn[b.indices] = b.copies
        counts = np.bincount(drawn, minlength=4)
        assert abs(counts[0] - 100) < 35 and (np.abs(counts[1:] - 100) < 35).all()
        parts = [BatchSampler.shared(noisy, rank, 2).epoch(epoch) for rank in range(2)]
        of_ranks = np.zeros(400, np.int64)
        for part in (p for rank in parts for p in rank):
            of_ranks[part.indices] = part.copies
        assert np.array_equal(of_ranks, drawn)
    assert all(
        p.copies is None for p in BatchSampler(frames, max_frames=1000, noise=0.5, copies=1, shuffle=False).epoch(0)
    )
