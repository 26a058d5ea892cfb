"""The demo's corpus: who reads what, and speech that a fresh process repeats byte for byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from stillhouse.data.errors import AudioError, ConfigError, CorpusError
from stillhouse.data.manifest import read_manifest
from stillhouse.train.demo import corpus as demo
from stillhouse.train.demo.espeak import EspeakVoice, speak_with_events
from stillhouse.train.demo.plan import ESPEAK, FULL, QUICK, VOICE_SETS, Size, plan, voice_set
from stillhouse.train.demo.stories import read_stories

TINY = Size(training=2, readers=1, test=1, known=1, training_on_new=0)


@pytest.mark.parametrize("engine", sorted(VOICE_SETS))
@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_no_voice_and_no_story_of_the_tests_is_trained_on(engine: str, size: Size) -> None:
    readings = plan(read_stories(), voice_set(engine), size)
    assert len({(r.voice.name, r.story.number) for r in readings}) == len(readings)
    heard = {r.voice.name for r in readings if r.split == "train"}
    told = {r.story.number for r in readings if r.split == "train"}
    assert told == {s.number for s in read_stories() if s.split == "train" and s.number <= (size.stories or 10**6)}
    for r in readings:
        if r.split == "test-known":
            assert r.voice.name not in heard and r.story.number in told
        if r.split == "test-new":
            assert r.story.split == "test" and r.story.number not in told
    assert {r.voice.name for r in readings if r.split == "test-known"} <= {
        r.voice.name for r in readings if r.split == "test-new"
    }


def test_each_story_has_its_readers() -> None:
    readings = [r for r in plan(read_stories(), ESPEAK, FULL) if r.split == "train"]
    stories = [s for s in read_stories() if s.split == "train"]
    count = Counter(r.story.number for r in readings)
    assert {count[s.number] for s in stories} == {1, 2} and len(count) == len(stories)
    assert count.total() == int(FULL.readers * len(stories))
    of_voice = Counter(r.voice.name for r in readings)
    assert len(of_voice) == FULL.training and max(of_voice.values()) - min(of_voice.values()) <= 1


def test_more_readers_than_voices_are_all_voices() -> None:
    readings = plan(read_stories(), ESPEAK, replace(FULL, training=3, readers=5, stories=4))
    train = [(r.voice.name, r.story.number) for r in readings if r.split == "train"]
    assert len(set(train)) == len(train) == 3 * 4


def test_test_voices_are_variants_of_their_own() -> None:
    def variant(v: EspeakVoice) -> str:
        return v.voice.partition("+")[2]

    def accent(v: EspeakVoice) -> str:
        return v.voice.partition("+")[0]

    for voice in ESPEAK.test:
        assert isinstance(voice, EspeakVoice)
        assert variant(voice) not in {variant(v) for v in ESPEAK.training if isinstance(v, EspeakVoice)}
        assert accent(voice) in {accent(v) for v in ESPEAK.training if isinstance(v, EspeakVoice)}


def test_no_such_voice() -> None:
    with pytest.raises(ConfigError, match="espeak or hibari"):
        voice_set("parrot")


def test_two_fresh_processes_say_the_same() -> None:
    pytest.importorskip("espeakng_loader")
    texts = ["The knight rode by the sea.", "One cold night, no one knew.", "The knight rode by the sea."]
    assert ESPEAK.training[1].voice == "en-us+f2"  # a voice with breath, which is noise
    # One worker, and a long text between: the two are more than a second apart, and the library knows the time.
    voices = [ESPEAK.training[1], ESPEAK.training[0], ESPEAK.training[1]]
    (rate_hz, first), (_, other), (_, second) = demo.speak_in_new_processes(
        voices, [texts, texts + texts[:1] * 400, texts], workers=1
    )
    assert rate_hz == 22050
    assert [a.tobytes() for a in first] == [b.tobytes() for b in second]
    assert first[0].tobytes() != other[0].tobytes()  # another voice is another sound
    assert all(0.8 * rate_hz < len(a) < 3 * rate_hz for a in first)  # 5 or 6 words at 205 a minute
    assert all(np.abs(a.astype(int)).max() > 3000 for a in first)


def test_espeak_says_where_its_words_begin() -> None:
    pytest.importorskip("espeakng_loader")
    text = "One night, she slept."
    rate_hz, ((samples, events),) = speak_with_events(ESPEAK.training[0], [text])
    assert [at for _, at in events if at >= 0] == [text.index(w) for w in ("One", "night", "she", "slept")]
    places = [place / rate_hz for place, _ in events]
    assert places == sorted(places) and places[0] == 0 and places[-1] <= len(samples) / rate_hz
    pause = events[[at for _, at in events].index(text.index("she")) - 1]
    assert pause[1] == -1  # the comma
    middle = (pause[0] + events[[at for _, at in events].index(text.index("she"))][0]) // 2
    assert np.abs(samples[middle - 200 : middle + 200].astype(int)).max() < 50


def test_espeak_has_no_such_voice() -> None:
    pytest.importorskip("espeakng_loader")
    with pytest.raises(AudioError, match="espeak-ng has no voice 'xx-nowhere'"):
        list(demo.speak_in_new_processes([EspeakVoice("zoe", "xx-nowhere")], [["Hello."]]))


def test_corpus_on_disk_and_again(tmp_path, monkeypatch) -> None:
    pytest.importorskip("espeakng_loader")
    few = [s for s in read_stories() if s.number <= 4 or s.split == "dev" or s.number == len(read_stories())]
    monkeypatch.setattr(demo, "read_stories", lambda: few)
    built = demo.build_demo_corpus(tmp_path, size=TINY)
    assert built.built
    corpus = read_manifest(built.path)
    assert len(corpus) == sum(built.utterances.values()) == len(corpus.by_id)
    assert set(built.utterances) == {"train", "dev", "test-known", "test-new"}
    by_number = {s.number: s for s in read_stories()}
    for session in corpus.sessions():
        utterances = [corpus.utterances[k] for k in session]
        number = int((utterances[0].session or "").split("-")[1])
        assert tuple(u.text for u in utterances) == by_number[number].sentences  # a session is a story, in order
        assert len({u.speaker for u in utterances}) == len({u.split for u in utterances}) == 1
    for u in corpus.utterances[::11]:
        info = soundfile.info(corpus.audio_path(u))
        assert (info.samplerate, info.channels) == (16000, 1)
        assert info.frames / 16000 == u.duration_s

    u = corpus.utterances[3]
    audio = corpus.audio_path(u).read_bytes()
    again = demo.build_demo_corpus(tmp_path, size=TINY)
    assert not again.built and again.seconds == built.seconds
    with pytest.raises(CorpusError, match="other stories, voices or size"):
        demo.build_demo_corpus(tmp_path, size=FULL)  # features made of the first would be taken for the second's
    (tmp_path / demo.STAMP).unlink()  # as if a run had been killed before its end
    corpus.audio_path(u).write_bytes(b"torn")
    assert demo.build_demo_corpus(tmp_path, size=TINY).built
    assert corpus.audio_path(u).read_bytes() == audio
