"""Where words are and where long audio is cut, over the states of a speech encoder: by the silences of the audio."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
import torch
import transformers

from stillhouse.data.audio.fbank import fbank
from stillhouse.data.batches.loader import BatchLoader
from stillhouse.data.errors import FeatureError
from stillhouse.data.features.compute import compute_features
from stillhouse.data.features.file import FeatureFile
from stillhouse.data.features.settings import Variant, times_of
from stillhouse.data.manifest import Corpus, Utterance, read_manifest, write_manifest
from stillhouse.data.units import Units
from stillhouse.extract.speech.rows import EncoderMethod, encoder_method
from stillhouse.train.decode.decode import loudness_of, transcribe
from stillhouse.train.decode.emissions import Emissions, Word
from stillhouse.train.decode.greedy import Greedy as AnyGreedy
from stillhouse.train.decode.stream import AudioFront, StreamDecoder, StreamResult
from stillhouse.train.decode.times import silences
from stillhouse.train.model.transducer import Transducer

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
UNITS = Units("characters", "none", ["<blank>", "<unk>", "▁", "a", "b"])
SOUNDS = ((0.3, 0.9), (1.4, 2.0))  # one word in each, the second of two letters


def wav2vec2() -> tuple[Any, Any]:
    config = transformers.Wav2Vec2Config(
        **SMALL, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4
    )
    return transformers.Wav2Vec2Model(config), transformers.Wav2Vec2FeatureExtractor(do_normalize=True)


def parakeet() -> tuple[Any, Any]:
    config = transformers.ParakeetEncoderConfig(**SMALL, num_mel_bins=80, subsampling_conv_channels=8)
    return transformers.ParakeetEncoder(config), transformers.ParakeetFeatureExtractor(feature_size=80)


def bursts(spans: tuple[tuple[float, float], ...], seconds: float) -> np.ndarray:
    """float32 samples at 16 kHz: loud noise in `spans`, and next to nothing elsewhere."""
    rng = np.random.default_rng(0)
    samples = 1e-4 * rng.standard_normal(int(16_000 * seconds))
    for start_s, end_s in spans:
        own = slice(int(16_000 * start_s), int(16_000 * end_s))
        samples[own] += 0.2 * rng.standard_normal(own.stop - own.start)
    return samples.astype(np.float32)


@pytest.fixture(scope="module", params=[wav2vec2, parakeet])
def method(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EncoderMethod:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    for part in request.param():
        part.save_pretrained(folder)
    return encoder_method(str(folder), 1, "cpu")


def loader_of(samples: np.ndarray, method: EncoderMethod, folder: Path) -> BatchLoader:
    soundfile.write(folder / "x.wav", samples, 16_000, subtype="FLOAT")
    write_manifest(folder / "corpus.jsonl", [Utterance(id="x", text="a ab", audio="x.wav")])
    corpus = read_manifest(folder / "corpus.jsonl")
    compute_features(corpus, folder / "f.h5", method=method, workers=0)
    return BatchLoader(corpus, FeatureFile(folder / "f.h5"), UNITS)


def model_of(method: EncoderMethod, subsampling: int) -> Transducer:
    torch.manual_seed(1)
    encoder = {"bins": method.settings.bins, "dim": 16, "layers": 1, "heads": 2, "inner": 16, "kernel": 3}
    encoder["subsampling"] = subsampling
    return Transducer(UNITS.size, encoder, predictor_dim=16, joint_dim=16).eval()


class Greedy(AnyGreedy):
    """With a unit in a frame, because the models have learnt nothing and would emit without end."""

    def __init__(self, model: Transducer, batch: int) -> None:
        super().__init__(model, batch, max_symbols=1)


class Told:
    """A search that emits "a ab" at given times, in the states that they fall into."""

    def __init__(self, times_s: tuple[float, ...], state_s: float, start_s: float, *_: Any) -> None:
        self.frames = [int((t - start_s) / state_s) for t in times_s]
        self.count = 0

    def feed(self, states: torch.Tensor, lengths: torch.Tensor) -> None:
        self.count += int(lengths[0])

    def finish(self) -> list[list[Emissions]]:
        assert max(self.frames) < self.count
        return [[Emissions([3, 2, 3, 4], self.frames, [0.5] * 4)]]


@pytest.mark.parametrize("subsampling", [1, 2])
def test_words_end_where_their_sound_does(method: EncoderMethod, subsampling: int, tmp_path: Path) -> None:
    samples = bursts(SOUNDS, 2.5)
    loader, model = loader_of(samples, method, tmp_path), model_of(method, subsampling)
    times = times_of(vars(method.settings))
    told = partial(Told, (0.6, 1.45, 1.6, 1.8), subsampling / times.hz, times.start_s)
    (found,) = transcribe(model, loader, device=torch.device("cpu"), search=lambda *_: told())
    decoder = StreamDecoder(
        model, UNITS, search=lambda *_: told(), front=AudioFront(partial(method.rows, id="x"), times)
    )
    assert not [*decoder.push(samples[:20_000]), *decoder.push(samples[20_000:])]
    (heard,) = decoder.finish()
    assert found.hyp == heard.hyp == "a ab"
    for words in (found.ranked[0].words, heard.ranked[0].words):
        assert_near(words, SOUNDS)
    assert found.ranked[0].words == heard.ranked[0].words


def assert_near(words: list[Word], spans: tuple[tuple[float, float], ...]) -> None:
    assert len(words) == len(spans)
    for word, span in zip(words, spans, strict=True):
        assert (word.start_s, word.end_s) == pytest.approx(span, abs=0.035)  # a window of fbank, and a frame


def test_the_file_tells_the_loudness_of_fbank_and_an_old_row_none(
    method: EncoderMethod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that an earlier version wrote have no loudness. New rows beside them do, and damage to it is found."""
    corpus, path = Corpus(tmp_path / "corpus.jsonl", []), tmp_path / "f.h5"
    for id in ("old", "new"):
        soundfile.write(tmp_path / f"{id}.wav", bursts(SOUNDS, 2.5), 16_000, subtype="FLOAT")
        corpus.utterances.append(Utterance(id=id, text="a ab", audio=f"{id}.wav"))
        with monkeypatch.context() as patch:
            if id == "old":
                patch.setattr(EncoderMethod, "loudness", lambda *_: None)
            compute_features(corpus, path, method=method, workers=0)
        file = FeatureFile(path).open()
        assert file.tells_loudness == (id == "new") and file.damaged_rows() == []
    known = file.loudness(file.numbers(["old", "new"]))
    np.testing.assert_array_equal(known, fbank(bursts(SOUNDS, 2.5)).mean(axis=1).astype(np.float16))
    assert not loudness_of(file, "old", file.gather(["old"])[0]).any()
    assert silences(loudness_of(file, "new", file.gather(["new"])[0]))[1] == pytest.approx((90, 140), abs=3)
    with h5py.File(path, "r+") as raw:
        raw["loudness"][100] += 1
    assert FeatureFile(path).damaged_rows() == [("new", Variant(1.0))]
    with h5py.File(path, "r+") as raw:
        raw["loudness_offsets"][1] = 7
    with pytest.raises(FeatureError, match="loudness do not match their checksum"):
        FeatureFile(path).open()


def pause_in(seconds: float) -> np.ndarray:
    """Loud but for the pause from 1.7 to 1.95 s."""
    return bursts(((0.0, 1.7), (1.95, seconds)), seconds)


def test_long_utterances_are_cut_at_pauses(method: EncoderMethod, tmp_path: Path) -> None:
    loader, model = loader_of(pause_in(5.0), method, tmp_path), model_of(method, 1)
    times, fed = loader.features.frame_times, []

    class Noting(Greedy):
        def feed(self, states: torch.Tensor, lengths: torch.Tensor) -> None:
            fed.append(lengths.tolist())
            super().feed(states, lengths)

    device, longest = torch.device("cpu"), int(2.0 * times.hz)
    (found,) = transcribe(model, loader, device=device, search=Noting, batch_frames=longest, longest=longest)
    counts = [count for lengths in fed for count in lengths]
    assert sum(counts) == int(loader.frames[0, 0]) and max(counts) <= longest and len(counts) >= 3
    assert 1.7 <= times.start_s + counts[0] / times.hz <= 1.95
    words = found.ranked[0].words
    assert words and all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(words))
    assert words[-1].start_s > 3 and words[-1].end_s == pytest.approx(5.0)


def heard(decoder: StreamDecoder, samples: np.ndarray, size: int) -> list[StreamResult]:
    pieces = [samples[at : at + size] for at in range(0, len(samples), size)]
    return [*(result for piece in pieces for result in decoder.push(piece)), *decoder.finish()]


def test_segments_end_at_pauses_and_the_encoder_gets_each_alone(method: EncoderMethod) -> None:
    samples, model = pause_in(5.03), model_of(method, 1)
    times, given = times_of(vars(method.settings)), []

    def rows(samples: np.ndarray) -> np.ndarray:
        given.append(len(samples))
        return method.rows(samples, "x")

    def decoder(**options: Any) -> StreamDecoder:
        return StreamDecoder(model, UNITS, search=Greedy, front=AudioFront(rows, times), **options)

    results = heard(decoder(segment_s=2.0), samples, 1_234)
    assert sum(given) == len(samples) and len(results) == len(given) >= 3
    assert 1.75 <= results[0].end_s <= 1.9 and all(r.final for r in results)
    assert all(a.end_s == b.start_s for a, b in pairwise(results)) and results[-1].end_s == pytest.approx(5.03)
    whole = heard(decoder(), samples[: given[0]], 16_000)
    assert (results[0].hyp, results[0].ranked[0].words) == (whole[0].hyp, whole[0].ranked[0].words)
    cut = decoder(longest=int(2.0 * times.hz))
    (joined,) = heard(cut, samples, 1_234)
    assert cut.cuts == len(results) - 1 and joined.hyp.replace(" ", "") == "".join(r.hyp for r in results).replace(
        " ", ""
    )


def test_a_rest_that_is_too_short_for_the_encoder_loses_nothing(method: EncoderMethod) -> None:
    samples = bursts(((0.0, 1.9),), 2.0)
    for extra in (1, 170, 330, 2_000):
        front = AudioFront(partial(method.rows, id="x"), times_of(vars(method.settings)))
        decoder = StreamDecoder(model_of(method, 1), UNITS, search=Greedy, front=front, segment_s=2.0)
        results = heard(decoder, np.concatenate([samples, samples[: extra + 8_000]]), 32_000)
        assert results[-1].final and results[-1].end_s == pytest.approx(2.5 + extra / 16_000, abs=0.011)


def test_a_corpus_of_segments_has_each_one_s_silences(method: EncoderMethod, tmp_path: Path) -> None:
    """Utterances that are segments of one recording, at two speeds."""
    samples = bursts(SOUNDS, 2.5)
    soundfile.write(tmp_path / "x.wav", samples, 16_000, subtype="FLOAT")
    cuts = {"one": (0.1, 1.0), "two": (1.2, 1.0)}
    utterances = [Utterance(id=k, text="a", audio="x.wav", start_s=s, duration_s=d) for k, (s, d) in cuts.items()]
    corpus = Corpus(tmp_path / "corpus.jsonl", utterances)
    compute_features(corpus, tmp_path / "f.h5", (1.0, 0.5), method=method, workers=0)
    file = FeatureFile(tmp_path / "f.h5").open()
    for id, (start_s, seconds) in cuts.items():
        own = samples[round(16_000 * start_s) : round(16_000 * (start_s + seconds))]
        loud = file.loudness(file.numbers([id], 1.0))
        np.testing.assert_array_equal(loud, fbank(own).mean(axis=1).astype(np.float16))
        assert len(file.loudness(file.numbers([id], 0.5))) == pytest.approx(200, abs=1)
    assert file.damaged_rows() == []
