"""The other voice: what its parameters do, with a stand-in for the package, which the tests do not install."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from stillhouse.data.errors import AudioError
from stillhouse.train.demo.espeak import EspeakVoice
from stillhouse.train.demo.espeak import speak as espeak
from stillhouse.train.demo.hibari import HibariVoice, speak


class StandIn(ModuleType):
    """Speaks a 200 Hz tone, half a second a word at speed 1, and a click beyond full scale at the end."""

    class Hibari:
        sample_rate = 24000

        def __call__(self, text: str, speed: float, seed: int) -> np.ndarray:
            samples = round(12000 * len(text.split()) / speed)
            wave = 0.5 * np.sin(2 * np.pi * 200 * np.arange(samples) / 24000).astype(np.float32)
            wave[-1] = 1.5
            return wave


def test_a_warped_voice_is_higher_and_as_long(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "hibari", StandIn("hibari"))
    lengths = []
    for warp in (1.0, 1.25):
        rate_hz, (wave,) = speak(HibariVoice("x", speed=2.0, warp=warp), ["one two three four"])
        assert rate_hz == 24000 * warp and wave.dtype == np.int16 and wave[-1] == 32767
        lengths.append(len(wave) / rate_hz)
        peak = np.abs(np.fft.rfft(wave[: rate_hz // 2])).argmax() * 2
        assert peak == pytest.approx(200 * warp, abs=2)
    assert lengths == [1.0, 1.0]  # four words at half a second, at twice the speed


@pytest.mark.parametrize(
    ("module", "say", "package"),
    [
        ("hibari", lambda: speak(HibariVoice("x", 1.0, 1.0), ["a"]), "hibari-tts"),
        ("espeakng_loader", lambda: espeak(EspeakVoice("x", "en-us"), ["a"]), "espeakng-loader"),
    ],
)
def test_without_the_package(monkeypatch, module: str, say, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AudioError, match=f"-m pip install {package}"):
        say()
