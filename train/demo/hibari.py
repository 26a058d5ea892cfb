"""The neural voice of `hibari-tts` (Apache-2.0), the demo's other voice: DEMO_VOICE=hibari.

The package carries one voice; the others would be fetched. So the demo's voices are that one at other speeds,
played `warp` times as fast, which moves pitch and formants together: a taller or a shorter speaker.

Invariant: the same samples for the same calls (the noise component is seeded).
Run: `DEMO_VOICE=hibari stillhouse demo`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.errors import AudioError


@dataclass(frozen=True)
class HibariVoice:
    """`speed` 0.5 to 2; `warp` above 1 is a shorter speaker."""

    name: str
    speed: float
    warp: float

    engine = "hibari-tts"

    @property
    def voice(self) -> str:
        return f"heart x {self.warp:g}"


def speak(voice: HibariVoice, texts: Sequence[str]) -> tuple[int, list[np.ndarray]]:
    """Speak every text: (sample rate in Hz, one int16 array [S] a text). AudioError without the package."""
    try:
        from hibari import Hibari
    except ImportError as e:
        raise AudioError(
            "DEMO_VOICE=hibari needs the package hibari-tts",
            where=voice.name,
            remedy=f"{sys.executable} -m pip install hibari-tts",
        ) from e
    engine = Hibari()
    # Playing at rate x warp shortens as well; the speed undoes that part of it.
    spoken = [engine(text, speed=voice.speed / voice.warp, seed=0) for text in texts]
    return round(engine.sample_rate * voice.warp), [
        (np.clip(samples, -1, 1) * 32767).astype(np.int16) for samples in spoken
    ]
