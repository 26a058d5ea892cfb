"""Sound that arrives in pieces is decoded as the whole is; segments, endpoints, models that cannot stream."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from stillhouse.data.audio.fbank import fbank
from stillhouse.data.errors import ConfigError, UsageError
from stillhouse.data.units import Units
from stillhouse.train.decode.beam import Beam
from stillhouse.train.decode.decode import quietest, rank_texts
from stillhouse.train.decode.greedy import Greedy, greedy_search
from stillhouse.train.decode.stream import StreamDecoder, StreamResult, chunk_size
from stillhouse.train.decode.times import loudness
from stillhouse.train.model.transducer import BLANK, Transducer

UNITS = Units("characters", "none", ["<blank>", "<unk>", "▁", *"abcd"])


def model(durations=(), **encoder) -> Transducer:
    torch.manual_seed(2)
    encoder = {"dim": 16, "layers": 2, "heads": 2, "inner": 16, "kernel": 3, "subsampling": 4, **encoder}
    found = Transducer(UNITS.size, encoder, predictor_dim=16, joint_dim=32, durations=durations).eval()
    with torch.no_grad():
        found.encoder.feature_mean.fill_(-6.0)
        found.encoder.feature_std.fill_(3.0)
        found.joint.output.weight.mul_(8)
        found.joint.output.bias[BLANK] += 5.0
    return found


STREAMING = {"causal": True, "chunk_frames": 32, "left_chunks": 2}


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose colour and strength change every tenth of a second."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(round(seconds * 10)):
        noise = rng.standard_normal(1_600) * rng.choice([0.001, 0.03, 0.3])
        parts.append(np.cumsum(noise) * 0.1 if rng.random() < 0.5 else noise)
    return np.clip(np.concatenate(parts), -1, 1).astype(np.float32)


def hear(decoder: StreamDecoder, samples: np.ndarray, arrivals: int) -> list[StreamResult]:
    found = []
    for at in range(0, len(samples), arrivals):
        found += decoder.push(samples[at : at + arrivals])
    return found + list(decoder.finish())


def whole(net: Transducer, samples: np.ndarray, search) -> StreamResult:
    features = torch.from_numpy(fbank(samples).astype(np.float16).astype(np.float32))
    decoder = search(net, 1)
    decoder.feed(*net.encode(features[None], torch.tensor([len(features)])))
    seconds, loud = len(features) / 100, loudness(features.numpy())
    return StreamResult(0, 0.0, seconds, True, rank_texts(UNITS, decoder.finish()[0], 4, loud, 3))


def assert_same(a: StreamResult, b: StreamResult) -> None:
    assert [r.hyp for r in a.ranked] == [r.hyp for r in b.ranked]
    assert [r.score for r in a.ranked] == pytest.approx([r.score for r in b.ranked], abs=2e-3)
    for mine, ours in zip(a.ranked[0].words, b.ranked[0].words, strict=True):
        assert mine.text == ours.text
        assert (mine.start_s, mine.end_s) == pytest.approx((ours.start_s, ours.end_s))
        assert mine.confidence == pytest.approx(ours.confidence, abs=1e-3)


@pytest.mark.parametrize("search", [Greedy, partial(Beam, width=4)], ids=["greedy", "beam"])
@pytest.mark.parametrize("arrivals", [170, 5_000, 1_000_000])
def test_the_final_result_is_that_of_the_whole(search, arrivals: int) -> None:
    net, samples = model(**STREAMING), sound(3.4)
    heard = hear(StreamDecoder(net, UNITS, search=search, chunk=32, nbest=3), samples, arrivals)
    assert [h.final for h in heard] == [False] * (len(heard) - 1) + [True]
    expected = whole(net, samples, search)
    assert len(expected.hyp) > 8
    assert_same(heard[-1], expected)
    if arrivals == 170:  # partial results came chunk by chunk, and each one is new
        assert len(heard) > 6
        assert all(round(h.end_s / 0.32, 6).is_integer() for h in heard[:-1])
        assert all(a.hyp != b.hyp for a, b in pairwise(heard[:-1]))
    again = hear(StreamDecoder(net, UNITS, search=search, chunk=32, nbest=3), samples, 777)
    if arrivals == 170:
        assert [h.hyp for h in again] == [h.hyp for h in heard]


def test_tokens_and_durations_stream() -> None:
    net, samples = model(durations=(0, 1, 2, 3), **STREAMING), sound(2.5, 1)
    heard = hear(StreamDecoder(net, UNITS, search=greedy_search, chunk=32), samples, 900)
    assert_same(heard[-1], whole(net, samples, greedy_search))
    assert len(heard[-1].hyp) > 3


@pytest.mark.parametrize("search", [Greedy, partial(Beam, width=3)], ids=["greedy", "beam"])
def test_segments_follow_one_another_whatever_the_arrivals(search) -> None:
    net, samples = model(**STREAMING), sound(4.1, 3)
    told = []
    for arrivals in (333, 40_000):
        decoder = StreamDecoder(net, UNITS, search=search, chunk=32, segment_s=1.0, endpoint_s=0.16)
        told.append([h for h in hear(decoder, samples, arrivals) if h.final])
    for a, b in zip(*told, strict=True):
        assert (a.segment, a.start_s, a.end_s) == (b.segment, b.start_s, b.end_s)
        assert_same(a, b)
    first = told[0]
    assert [h.segment for h in first] == list(range(len(first))) and len(first) > 4
    assert first[0].start_s == 0 and first[-1].end_s == pytest.approx(4.12, abs=0.02)  # whole encoder frames
    assert all(a.end_s == b.start_s for a, b in pairwise(first))
    assert all(h.end_s - h.start_s <= 1.0 + 1e-6 for h in first)
    assert any(h.end_s - h.start_s < 0.9 for h in first[:-1])  # an endpoint
    assert all(h.start_s <= w.start_s <= w.end_s <= h.end_s + 1e-6 for h in first for w in h.ranked[0].words)
    assert any(w.start_s > 2 for h in first for w in h.ranked[0].words)


def test_a_model_of_whole_utterances_waits_for_the_end() -> None:
    net, samples = model(), sound(3.4)
    (only,) = hear(StreamDecoder(net, UNITS, search=Greedy), samples, 500)
    assert_same(only, whole(net, samples, Greedy))
    assert (only.final, only.start_s, only.end_s) == (True, 0.0, pytest.approx(3.4))


def test_or_for_the_quietest_place_of_a_segment() -> None:
    samples = sound(5.0, 4)
    samples[int(1.7 * 16_000) : int(1.95 * 16_000)] *= 1e-4  # a pause in the last third of 2 s
    heard = hear(StreamDecoder(model(), UNITS, search=Greedy, segment_s=2.0), samples, 1_234)
    assert all(h.final for h in heard)
    assert 1.75 <= heard[0].end_s <= 1.9
    assert all(a.end_s == b.start_s for a, b in pairwise(heard))
    assert heard[-1].end_s == pytest.approx(5.0) and all(h.end_s - h.start_s <= 2 for h in heard)
    assert_same(heard[0], whole_of_frames(model(), samples, round(100 * heard[0].end_s)))


def whole_of_frames(net: Transducer, samples: np.ndarray, frames: int) -> StreamResult:
    features = torch.from_numpy(fbank(samples)[:frames].astype(np.float16).astype(np.float32))
    decoder = Greedy(net, 1)
    decoder.feed(*net.encode(features[None], torch.tensor([frames])))
    texts = rank_texts(UNITS, decoder.finish()[0], 4, loudness(features.numpy()))
    return StreamResult(0, 0.0, frames / 100, True, texts)


def test_quietest_stays_in_the_last_third() -> None:
    loud = np.zeros(90)
    loud[10:20] = -9  # quieter, but too early
    loud[70:74] = -5
    assert quietest(loud) in (71, 72)
    assert quietest(np.zeros(1)) == 1
    for frames in (2, 3, 11, 40):
        assert 1 <= quietest(np.random.default_rng(frames).random(frames)) <= frames


def test_silence_and_next_to_nothing() -> None:
    for net, chunk in ((model(), 0), (model(**STREAMING), 32)):
        for samples in (np.zeros(10, np.float32), np.zeros(400, np.float32)):
            heard = hear(StreamDecoder(net, UNITS, search=Greedy, chunk=chunk), samples, 100)
            assert [h.final for h in heard][-1:] == [True]
    assert heard[-1].end_s == pytest.approx(0.04)


def test_the_chunk_is_the_models_or_another() -> None:
    net = model(**STREAMING)
    assert (chunk_size(net), chunk_size(net, 64), chunk_size(model())) == (32, 64, 0)
    assert chunk_size(model(causal=True, chunk_choices=(0, 16, 64))) == 64
    with pytest.raises(UsageError, match="not trained to stream"):
        chunk_size(model(), 32)
    with pytest.raises(ConfigError, match="chunk_frames = 30"):
        StreamDecoder(net, UNITS, search=Greedy, chunk=30)
    with pytest.raises(UsageError, match="longer than the utterances of training"):
        chunk_size(net, 3_200)


@pytest.mark.parametrize("options", [{}, {"segment_s": 4.0}], ids=["whole", "segments"])
@pytest.mark.parametrize("streams", [False, True])
def test_long_audio_is_cut_and_its_texts_are_joined(streams: bool, options: dict) -> None:
    net = model(**STREAMING) if streams else model()
    samples = sound(9.3, 5)
    told = []
    for arrivals in (1_111, 1_000_000):
        decoder = StreamDecoder(net, UNITS, search=Greedy, chunk=32 if streams else 0, longest=150, **options)
        told.append([h for h in hear(decoder, samples, arrivals) if h.final])
        assert decoder.cuts >= 4
    for a, b in zip(*told, strict=True):
        assert (a.segment, a.start_s, a.end_s) == (b.segment, b.start_s, b.end_s)
        assert_same(a, b)
    assert len(told[0]) == 1 if not options else len(told[0]) >= 3
    assert told[0][0].start_s == 0 and told[0][-1].end_s == pytest.approx(9.3, abs=0.04)
    assert all(a.end_s == b.start_s for a, b in pairwise(told[0]))
    assert all(h.end_s - h.start_s <= 4.0 + 1e-6 for h in told[0] if options)
    for result in told[0]:
        words = result.ranked[0].words
        assert [w.text for w in words] == result.hyp.split()
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(words))
        assert words[0].start_s >= result.start_s and words[-1].end_s <= result.end_s + 1e-6
        assert words[-1].start_s > result.end_s - 2  # times count from the start of the audio


def test_memory_does_not_grow_with_the_audio() -> None:
    """An hour has no more in memory than a minute: features, loudness and states are those of a part."""
    for net, chunk in ((model(), 0), (model(**STREAMING), 32)):
        decoder = StreamDecoder(net, UNITS, search=Greedy, chunk=chunk, longest=200)
        features = np.random.default_rng(0).normal(-6, 3, (6_000, 80)).astype(np.float32)
        sizes = []
        for at in range(0, len(features), 500):
            list(decoder._push_features(features[at : at + 500]))
            sizes.append(len(decoder.waiting) + len(decoder.loud) + sum(len(r.units) for r in decoder.decoder.results))
        assert decoder.cuts >= 20
        assert max(sizes) < 700
