"""The settings that decide the numbers in a feature file, and when its frames are.

Guarantees: two files with equal fingerprints hold the same numbers for the same samples.
Try: `stillhouse corpus info features.h5`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from ..errors import ConfigError

FBANK_HZ = 100.0  # frames in a second of files that record no frame_hz
PLACES = ("encoder",)  # Settings that say where something lies, and decide no number.


class Variant(NamedTuple):
    """What was done to the sound of an utterance: its speed, and which noisy copy it is. Copy 0 has no noise."""

    speed: float = 1.0
    copy: int = 0

    def __str__(self) -> str:
        return f"speed {self.speed:g}" + (f", copy {self.copy}" if self.copy else "")


@dataclass(frozen=True)
class FeatureSettings:
    """The settings that decide the numbers in a feature file. StaleError uses their names.

    The other settings of fbank are fixed (see `audio.fbank`). `method` changes with them.
    """

    method: str = "kaldi fbank 1"
    rate_hz: int = 16000
    bins: int = 80

    def __post_init__(self) -> None:
        if not 1000 <= self.rate_hz <= 192000:
            raise ConfigError(f"a rate of {self.rate_hz} Hz", expected="1000 to 192000 Hz")
        self._check_width()

    def _check_width(self) -> None:
        if not 4 <= self.bins <= 256:
            raise ConfigError(f"{self.bins} mel bins", expected="4 to 256")

    @property
    def fingerprint(self) -> str:
        """A hash of the settings, without the place of an encoder."""
        deciding = {name: value for name, value in asdict(self).items() if name not in PLACES}
        return blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=8).hexdigest()

    def differences(self, stored: dict) -> list[str]:
        """Return, as texts, what differs from the settings of a file. An encoder may lie elsewhere."""
        return differing(stored, asdict(self), "here")


@dataclass(frozen=True)
class EncoderSettings(FeatureSettings):
    """The settings of rows that are the states of a speech encoder. `bins` is the width of a state.

    encoder         where it was loaded from: a folder, or its name on the Hugging Face hub
    architecture    its model_type, such as "whisper"
    weights         a hash of its weights and of its feature extractor's settings
    layer           0 is what goes into the first layer
    frame_hz        rows in a second of audio
    offset_s        time of the middle of row 0
    """

    method: str = "encoder 1"
    encoder: str = ""
    architecture: str = ""
    weights: str = ""
    layer: int = 0
    frame_hz: float = 50.0
    offset_s: float = 0.0

    def _check_width(self) -> None:
        if not 1 <= self.bins <= 1 << 16:
            raise ConfigError(f"states of {self.bins} numbers", expected="1 to 65536")


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of features are: `hz` in a second, and the first begins at `start_s`."""

    hz: float = FBANK_HZ
    start_s: float = 0.0


FBANK_TIMES = FrameTimes()


def times_of(settings: Mapping[str, Any] | None) -> FrameTimes:
    """Return when the frames are, by the settings of a feature file. None is fbank, which begins with the audio."""
    if settings is None or "frame_hz" not in settings:
        return FBANK_TIMES
    hz = float(settings["frame_hz"])
    if not 0 < hz <= 1000:
        raise ValueError(f"{hz} frames in a second")
    return FrameTimes(hz, float(settings["offset_s"]) - 0.5 / hz)


def is_encoder(settings: Mapping[str, Any] | None) -> bool:
    """Return whether rows of these settings are the states of a speech encoder."""
    return settings is not None and "encoder" in settings


def differing(stored: Mapping[str, Any], own: Mapping[str, Any], place: str) -> list[str]:
    """Return in words which settings of a file differ from `own` ones, which are those at `place`."""
    return [
        f"{name} is {stored.get(name)!r} there and {own.get(name)!r} {place}"
        for name in {**own, **stored}
        if stored.get(name) != own.get(name) and name not in PLACES
    ]
