"""The voices of espeak-ng, through ctypes. This module alone imports `espeakng_loader`, the extra `demo`.

espeak-ng has the GPL, version 3. This repository contains nothing of it, and only the demo uses it.

Guarantees: a new process that makes the same calls in the same order gets the same samples. Later calls in one process
differ, because the library keeps state. `corpus.speak_in_new_processes` therefore gives each voice a process.
Try: `stillhouse demo`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.errors import AudioError

SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: the callback gets the samples, and espeak_Synth returns at the end
BUFFER_MS = 200
CHARS_UTF8 = 1
SEED = 1  # of the breath and flutter of a voice, which the library seeds with the time of day
RATE, PITCH, RANGE, WORDGAP = 1, 3, 4, 7  # espeak_PARAMETER


@dataclass(frozen=True)
class EspeakVoice:
    """A voice: a language and a variant, such as "en-us+f2".

    rate: words a minute.
    pitch, pitch_range: 0 to 99.
    gap: pause between words, in units of 10 ms.
    """

    name: str
    voice: str
    rate: int = 210
    pitch: int = 50
    pitch_range: int = 50
    gap: int = 0

    engine = "espeak-ng"


def speak(voice: EspeakVoice, texts: Sequence[str]) -> tuple[int, list[np.ndarray]]:
    """Speak some texts with one voice. Return the sample rate in Hz and int16 [S] for each text.

    Raises AudioError if the library, its data or the voice is missing.
    """
    library, data_path = _load()
    chunks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    rate_hz = library.espeak_Initialize(SYNCHRONOUS, BUFFER_MS, data_path, 0)
    if rate_hz <= 0:
        raise AudioError("espeak-ng does not start", where=data_path.decode())
    library.espeak_ng_SetRandSeed(SEED)
    library.espeak_SetSynthCallback(collect)
    if library.espeak_SetVoiceByName(voice.voice.encode()) != 0:
        raise AudioError(f"espeak-ng has no voice {voice.voice!r}", where=voice.name)
    settings = {RATE: voice.rate, PITCH: voice.pitch, RANGE: voice.pitch_range, WORDGAP: voice.gap}
    for parameter, value in settings.items():
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


def _load() -> tuple[ctypes.CDLL, bytes]:
    """Return the library and the path of its data."""
    try:
        import espeakng_loader
    except ImportError as e:
        raise AudioError(
            "the demo speaks with espeak-ng (GPL-3), which is not installed",
            remedy=f"{sys.executable} -m pip install espeakng-loader",
        ) from e
    number, text, unsigned, pointer = ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_void_p
    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    library.espeak_Initialize.argtypes = [number, number, text, number]
    library.espeak_SetVoiceByName.argtypes = [text]
    library.espeak_SetParameter.argtypes = [number, number, number]
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_Synth.argtypes = [
        *(text, ctypes.c_size_t, unsigned, number, unsigned, unsigned),
        *(ctypes.POINTER(unsigned), pointer),
    ]
    return library, str(espeakng_loader.get_data_path()).encode()
