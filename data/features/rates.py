"""The sample rate of features: that of the audio, up to 16 kHz, if none is asked for.

Guarantees: audio is never brought to a higher rate than its own unless the user asks for that rate. The upper half of
such features is what the resampler leaves there, and a model comes to depend on it.
Try: `stillhouse corpus features calls.jsonl features.h5`.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ..audio.read import open_audio
from ..errors import AudioError, ConfigError, FeatureError
from ..manifest import Corpus
from .file import FeatureFile

USUAL_HZ = 16000
THREADS = 16  # They wait for the disk, or for the network.


def audio_rates(corpus: Corpus) -> Counter[int]:
    """Return {Hz: number of audio files} by the headers. Files that cannot be read are left out."""
    files = {corpus.audio_path(u) for u in corpus.utterances if u.audio is not None}
    with ThreadPoolExecutor(THREADS) as pool:
        return Counter(hz for hz in pool.map(_rate, files) if hz is not None)


def _rate(path: Path) -> int | None:
    with suppress(AudioError), open_audio(path) as file:
        return int(file.samplerate)
    return None


def default_rate(corpus: Corpus, path: Path) -> int:
    """Return the rate in Hz of the features of a corpus: that of its feature file or of its parts, else of the audio.

    Rates above 16 kHz become 16 kHz, and others whole kHz, because a frame is 10 ms. Raises ConfigError if the audio
    has several rates and one of them is lower than 16 kHz.
    """
    parts = path.with_name(path.name + ".parts")
    for source in [*([path] if path.exists() else []), *sorted(parts.glob("part-*.h5"))]:
        with suppress(FeatureError), FeatureFile(source) as file:
            return int(file.settings["rate_hz"])
    files = audio_rates(corpus)
    rates = {min(hz, USUAL_HZ) // 1000 * 1000 for hz in files}
    if len(rates) > 1:
        counts = ", ".join(f"{hz} Hz in {n} files" for hz, n in sorted(files.items()))
        remedy = f"give --rate {min(rates)} for all of it. With a higher one, some files have nothing in the upper band"
        raise ConfigError(f"the audio has {counts}", where=corpus.path, expected="one rate", remedy=remedy)
    return rates.pop() if rates else USUAL_HZ
