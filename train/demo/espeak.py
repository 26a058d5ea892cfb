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
PHONEME_EVENTS = 1  # an option of espeak_Initialize
LIST_END, WORD, PHONEME = 0, 1, 7  # espeak_EVENT_TYPE
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
    rate_hz, spoken = speak_with_events(voice, texts)
    return rate_hz, [samples for samples, _ in spoken]


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        *(("kind", ctypes.c_int), ("id", ctypes.c_uint), ("character", ctypes.c_int), ("length", ctypes.c_int)),
        *(("time_ms", ctypes.c_int), ("sample", ctypes.c_int), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 8)),
    )


def speak_with_events(
    voice: EspeakVoice, texts: Sequence[str]
) -> tuple[int, list[tuple[np.ndarray, list[tuple[int, int]]]]]:
    """Speak as `speak` does. Return the rate and, for each text, int16 [S] and its events in order.

    An event is (sample, character): from there on the library speaks the word that begins with this character of the
    text, or a pause if the character is negative.
    """
    library, data_path = _load()
    chunks: list[np.ndarray] = []
    events: list[tuple[int, int]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
    def collect(samples, count, found):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while found and found[number].kind != LIST_END:
            event = found[number]
            if event.kind == WORD:
                events.append((event.sample, event.character - 1))
            elif event.kind == PHONEME and event.name.startswith(b"_"):
                events.append((event.sample, -1))
            number += 1
        return 0

    rate_hz = library.espeak_Initialize(SYNCHRONOUS, BUFFER_MS, data_path, PHONEME_EVENTS)
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
        events.clear()
        data = text.encode()
        if library.espeak_Synth(data, len(data) + 1, 0, 0, 0, CHARS_UTF8, None, None) != 0:
            raise AudioError(f"espeak-ng could not speak {text!r}", where=voice.name)
        spoken.append((np.concatenate(chunks) if chunks else np.zeros(0, np.int16), events.copy()))
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
