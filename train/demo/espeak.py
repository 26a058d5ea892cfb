"""espeak-ng's voices, through ctypes; the one module that imports `espeakng_loader` (the extra `demo`).

espeak-ng is under the GPL, version 3; nothing of it is in this repository, and nothing but the demo calls it.

Invariant: `speak` gives the same samples whenever a fresh process makes the same calls in the same order.
Later calls in one process differ (it keeps state): corpus.speak_fresh gives each voice a process of its own.
Run: `stillhouse demo`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.errors import AudioError

SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback, espeak_Synth returns when it is done
BUFFER_MS = 200
CHARS_UTF8 = 1
SEED = 1  # of the breath and flutter of a voice, which the library seeds with the time of day
RATE, PITCH, RANGE, WORDGAP = 1, 3, 4, 7  # espeak_PARAMETER


@dataclass(frozen=True)
class EspeakVoice:
    """`voice`: a language and a variant, "en-us+f2". Rate in words a minute; pitch and its range 0 to 99; the
    gap between words in units of 10 ms."""

    name: str
    voice: str
    rate: int = 210
    pitch: int = 50
    pitch_range: int = 50
    gap: int = 0

    engine = "espeak-ng"


def speak(voice: EspeakVoice, texts: Sequence[str]) -> tuple[int, list[np.ndarray]]:
    """Speak every text with one voice: (sample rate in Hz, one int16 array [S] a text).

    Raises AudioError where the library, its data or the voice is missing.
    """
    library = _load()
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    rate_hz = library.espeak_Initialize(SYNCHRONOUS, BUFFER_MS, _data_path(), 0)
    if rate_hz <= 0:
        raise AudioError("espeak-ng does not start", where=_data_path().decode())
    library.espeak_ng_SetRandSeed(SEED)
    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(voice.voice.encode()) != 0:
        raise AudioError(f"espeak-ng has no voice {voice.voice!r}", where=voice.name)
    for parameter, value in (
        (RATE, voice.rate),
        (PITCH, voice.pitch),
        (RANGE, voice.pitch_range),
        (WORDGAP, voice.gap),
    ):
        library.espeak_SetParameter(parameter, value, 0)
    spoken = []
    for text in texts:
        chunks.clear()
        data = text.encode()
        if library.espeak_Synth(data, len(data) + 1, 0, 0, 0, CHARS_UTF8, None, None) != 0:
            raise AudioError(f"espeak-ng could not speak {text!r}", where=voice.name)
        spoken.append(np.concatenate(chunks) if chunks else np.zeros(0, np.int16))
    library.espeak_Terminate()
    return rate_hz, spoken


def _data_path() -> bytes:
    import espeakng_loader

    return str(espeakng_loader.get_data_path()).encode()


def _load() -> ctypes.CDLL:
    try:
        import espeakng_loader
    except ImportError as e:
        raise AudioError(
            "the demo speaks with espeak-ng (GPL-3), which is not installed",
            remedy=f"{sys.executable} -m pip install espeakng-loader",
        ) from e
    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.POINTER(ctypes.c_uint),
        ctypes.c_void_p,
    ]
    return library
