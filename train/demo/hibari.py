"""The neural voice of `hibari-tts` (Apache-2.0), the demo's other voice: DEMO_VOICE=hibari.

The package has one voice and would download others. So the demo's voices are that one at different speeds, played
`warp` times as fast. This moves pitch and formants together, as with a taller or a shorter speaker.

Guarantees: the same calls give the same samples, because the noise is seeded.
Try: `DEMO_VOICE=hibari stillhouse demo`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.errors import AudioError


@dataclass(frozen=True)
class HibariVoice:
    """A voice: `speed` is 0.5 to 2, and `warp` above 1 sounds like a shorter speaker."""

    name: str
    speed: float
    warp: float

    engine = "hibari-tts"

    @property
    def voice(self) -> str:
        return f"heart x {self.warp:g}"


def speak(voice: HibariVoice, texts: Sequence[str]) -> tuple[int, list[np.ndarray]]:
    """Do what `espeak.speak` does. Raises AudioError if the package is not installed."""
    try:
        from hibari import Hibari
    except ImportError as e:
        raise AudioError(
            "DEMO_VOICE=hibari needs the package hibari-tts",
            where=voice.name,
            remedy=f"{sys.executable} -m pip install hibari-tts",
        ) from e
    engine = Hibari()
    # A higher playing rate also shortens the audio, and the speed corrects that.
    spoken = [np.clip(engine(text, speed=voice.speed / voice.warp, seed=0), -1, 1) for text in texts]
    return round(engine.sample_rate * voice.warp), [(samples * 32767).astype(np.int16) for samples in spoken]
