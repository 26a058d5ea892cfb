"""Who reads which story in the demo, and what for.

Invariant: no voice of the tests or of dev, and no story of stories-dev.txt or stories-test.txt, is in train.
Run: `stillhouse demo`.

    split        stories                      voices
    train        of the training              heard, who take turns: each story has one reader, some have two
    dev          one of training, one new     one that is nowhere else; the new one by some heard voices too
    test-known   of the training              never heard in training
    test-new     new                          never heard in training, and some heard (the report parts them)
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
class Cast:
    """The voices of one engine. The tests' voices are variants of their own, in accents of the training."""

    heard: tuple[Voice, ...]
    dev: Voice
    unheard: tuple[Voice, ...]


ESPEAK = Cast(
    heard=(
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
    unheard=(
        EspeakVoice("kit", "en-us+f4", rate=205, pitch=50),
        EspeakVoice("lou", "en-gb-x-rp+m2", rate=210, pitch=45),
        EspeakVoice("max", "en-us+m6", rate=215, pitch=50),
    ),
)

HIBARI = Cast(
    heard=tuple(
        HibariVoice(name, speed, warp)
        for name, speed, warp in (
            ("ben", 1.25, 0.84),
            ("amy", 1.30, 1.00),
            ("eli", 1.35, 0.92),
            ("dot", 1.25, 1.16),
            ("cal", 1.40, 0.88),
            ("fay", 1.30, 1.08),
            ("gus", 1.25, 0.96),
            ("ivy", 1.40, 1.12),
            ("hal", 1.20, 0.80),
            ("jon", 1.35, 1.04),
        )
    ),
    dev=HibariVoice("nan", 1.30, 1.06),
    unheard=(HibariVoice("kit", 1.25, 1.10), HibariVoice("lou", 1.30, 0.94), HibariVoice("max", 1.35, 0.86)),
)

CASTS = {"espeak": ESPEAK, "hibari": HIBARI}


@dataclass(frozen=True)
class Size:
    """How much of it is read: full, or the few minutes of --quick."""

    heard: int = 10  # voices
    readers: float = 1.3  # of them, for a story, on average: new sentences teach more than a sentence once more
    stories: int | None = None  # of the training; None: all
    unheard: int = 3
    known: int = 5  # stories of the training that each unheard voice reads
    heard_on_new: int = 2  # heard voices that read the new stories too


FULL = Size()
QUICK = Size(heard=3, readers=1, stories=30, unheard=2, known=2, heard_on_new=0)


@dataclass(frozen=True)
class Reading:
    """One voice reads one story: a session of the corpus."""

    voice: Voice
    story: Story
    split: str


def cast(name: str) -> Cast:
    if name not in CASTS:
        raise ConfigError(f"no demo voice {name!r}", where="DEMO_VOICE", expected=" or ".join(CASTS))
    return CASTS[name]


def plan(stories: Sequence[Story], cast: Cast, size: Size = FULL) -> list[Reading]:
    """All readings; those of one voice in the order of the stories."""
    by_split = {split: [s for s in stories if s.split == split] for split in ("train", "dev", "test")}
    by_split["train"] = by_split["train"][: size.stories]
    heard = cast.heard[: size.heard]
    # Whose turn it is when a story begins; a voice twice in a turn would be one reader, not two
    turn = [int(j * min(size.readers, len(heard))) for j in range(len(by_split["train"]) + 1)]
    readings = [
        Reading(voice, story, "train")
        for i, voice in enumerate(heard)
        for j, story in enumerate(by_split["train"])
        if (i - turn[j]) % len(heard) < turn[j + 1] - turn[j]
    ]
    readings += [Reading(cast.dev, story, "dev") for story in by_split["train"][:1] + by_split["dev"]]
    readings += [Reading(voice, story, "dev") for voice in heard[-2:] for story in by_split["dev"]]
    for i, voice in enumerate(cast.unheard[: size.unheard]):
        mine = by_split["train"][i :: size.unheard][: size.known]
        readings += [Reading(voice, story, "test-known") for story in mine]
        readings += [Reading(voice, story, "test-new") for story in by_split["test"]]
    readings += [
        Reading(voice, story, "test-new") for voice in heard[: size.heard_on_new] for story in by_split["test"]
    ]
    return readings
