"""Which voice of the demo reads which story, and for which split.

Guarantees: no voice of the test sets or of dev, and no story of stories-dev.txt or stories-test.txt, is in train.
Try: `stillhouse demo`.

    split        stories                      voices
    train        training stories             training voices in turn: each story has one reader, some have two
    dev          one training, one new story  the dev voice, and two training voices for the new story
    test-known   training stories             test voices
    test-new     new stories                  test voices, and some training voices (the report separates them)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...data.errors import ConfigError
from .espeak import EspeakVoice
from .hibari import HibariVoice
from .stories import Story

Voice = EspeakVoice | HibariVoice


@dataclass(frozen=True)
class VoiceSet:
    """The voices of one engine. Test voices are variants of their own, in accents that training has, too."""

    training: tuple[Voice, ...]
    dev: Voice
    test: tuple[Voice, ...]


ESPEAK = VoiceSet(
    training=(
        EspeakVoice("ben", "en-us", rate=210, pitch=45),
        EspeakVoice("amy", "en-us+f2", rate=205, pitch=50),
        EspeakVoice("eli", "en+m1", rate=215, pitch=50),
        EspeakVoice("dot", "en+f1", rate=200, pitch=55),
        EspeakVoice("cal", "en-us+m3", rate=220, pitch=40),
        EspeakVoice("fay", "en-gb-x-rp+f3", rate=210, pitch=45),
        EspeakVoice("gus", "en-gb-scotland+m4", rate=205, pitch=55),
        EspeakVoice("ivy", "en-us-nyc+f1", rate=215, pitch=45),
        EspeakVoice("hal", "en-us+m5", rate=200, pitch=50),
        EspeakVoice("jon", "en-gb-x-gbclan+m7", rate=210, pitch=50),
    ),
    dev=EspeakVoice("nan", "en-us+f5", rate=210, pitch=40),
    test=(
        EspeakVoice("kit", "en-us+f4", rate=205, pitch=50),
        EspeakVoice("lou", "en-gb-x-rp+m2", rate=210, pitch=45),
        EspeakVoice("max", "en-us+m6", rate=215, pitch=50),
    ),
)

HIBARI = VoiceSet(
    training=tuple(
        HibariVoice(*facts)
        for facts in (
            ("ben", 1.25, 0.84), ("amy", 1.30, 1.00), ("eli", 1.35, 0.92), ("dot", 1.25, 1.16), ("cal", 1.40, 0.88),
            ("fay", 1.30, 1.08), ("gus", 1.25, 0.96), ("ivy", 1.40, 1.12), ("hal", 1.20, 0.80), ("jon", 1.35, 1.04),
        )
    ),
    dev=HibariVoice("nan", 1.30, 1.06),
    test=(HibariVoice("kit", 1.25, 1.10), HibariVoice("lou", 1.30, 0.94), HibariVoice("max", 1.35, 0.86)),
)  # fmt: skip

VOICE_SETS = {"espeak": ESPEAK, "hibari": HIBARI}


@dataclass(frozen=True)
class Size:
    """How much is read.

    training: training voices.
    readers: how many of them read a training story, on average. New sentences teach more than the same one again.
    stories: training stories. None: all.
    test: test voices.
    known: training stories that each test voice reads.
    training_on_new: training voices that also read the new stories.
    """

    training: int = 10
    readers: float = 1.3
    stories: int | None = None
    test: int = 3
    known: int = 5
    training_on_new: int = 2


FULL = Size()
QUICK = Size(training=3, readers=1, stories=30, test=2, known=2, training_on_new=0)


@dataclass(frozen=True)
class Reading:
    """One voice reads one story: a session of the corpus."""

    voice: Voice
    story: Story
    split: str


def voice_set(name: str) -> VoiceSet:
    """Return the voices of an engine. Raises ConfigError if there is no such engine."""
    if name not in VOICE_SETS:
        raise ConfigError(f"the demo has no voices {name!r}", where="DEMO_VOICE", expected=" or ".join(VOICE_SETS))
    return VOICE_SETS[name]


def plan(stories: Sequence[Story], voices: VoiceSet, size: Size = FULL) -> list[Reading]:
    """Return all readings. Those of one voice are in the order of the stories."""
    by_split = {split: [s for s in stories if s.split == split] for split in ("train", "dev", "test")}
    known, new = by_split["train"][: size.stories], by_split["test"]
    training = voices.training[: size.training]
    # turn[j] is the number of readings before story j. A voice that reads a story twice would be one reader, not two.
    turn = [int(j * min(size.readers, len(training))) for j in range(len(known) + 1)]
    readings = [
        Reading(voice, story, "train")
        for i, voice in enumerate(training)
        for j, story in enumerate(known)
        if (i - turn[j]) % len(training) < turn[j + 1] - turn[j]
    ]
    readings += [Reading(voices.dev, story, "dev") for story in known[:1] + by_split["dev"]]
    readings += [Reading(voice, story, "dev") for voice in training[-2:] for story in by_split["dev"]]
    for i, voice in enumerate(voices.test[: size.test]):
        readings += [Reading(voice, story, "test-known") for story in known[i :: size.test][: size.known]]
        readings += [Reading(voice, story, "test-new") for story in new]
    readings += [Reading(voice, story, "test-new") for voice in training[: size.training_on_new] for story in new]
    return readings
