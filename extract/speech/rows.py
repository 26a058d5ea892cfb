"""Rows of a feature file that are the states of one layer of a speech encoder: the front end of a transducer.

Guarantees: rows are those of `SpeechEncoder.states`, rounded to float16. What float16 cannot hold is an error.
Try: `stillhouse corpus features corpus.jsonl whisper.h5 --encoder MODEL --layer 4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...data.errors import AudioError, StaleError, UsageError
from ...data.features.methods import mean_energy
from ...data.features.settings import EncoderSettings
from ..teacher.model import pick_device
from .encoder import SpeechEncoder, load_encoder

LARGEST = float(np.finfo(np.float16).max)


class EncoderMethod:
    """The states of a layer of a speech encoder, as a method of `compute_features`.

    A copy that was pickled loads the encoder again when it computes its first rows.
    """

    worker_s = 120.0

    def __init__(self, settings: EncoderSettings, device: str, encoder: SpeechEncoder | None = None) -> None:
        self.settings, self.device, self._encoder = settings, device, encoder
        self.on_gpu = device.startswith("cuda")

    def __reduce__(self) -> tuple:
        return EncoderMethod, (self.settings, self.device)

    @property
    def encoder(self) -> SpeechEncoder:
        """The encoder, loaded at the first use. Raises StaleError if it has other weights than the settings say."""
        if self._encoder is None:
            self._encoder = load_encoder(self.settings.encoder, self.device)
            _refuse_other_weights(self.settings.encoder, self.settings.weights, self._encoder.weights_hash())
        return self._encoder

    def rows(self, samples: np.ndarray, id: str) -> np.ndarray:
        """Return the states of an utterance, float32 [T, bins], all of which float16 can hold.

        Raises:
            AudioError: the audio is too short for the encoder, or a number is not finite or beyond float16.
        """
        states = self.encoder.states(samples, [self.settings.layer], id=id)[0]
        if (largest := float(np.abs(states).max())) > LARGEST:
            what = f"a state of layer {self.settings.layer} has a number of {largest:.3g}, which float16 cannot hold"
            raise AudioError(what, where=id, expected=f"at most {LARGEST:.0f}", remedy="choose another --layer")
        return states

    def loudness(self, samples: np.ndarray) -> np.ndarray:
        """Return the mean log mel energy of each 10 ms, which states do not tell, float32 [F]."""
        return mean_energy(samples, self.settings.rate_hz)


def encoder_method(source: str, layer: int, device: str = "auto") -> EncoderMethod:
    """Load a speech encoder, and return the method that computes rows from its layer.

    Arguments:
        source: a folder, or a name on the Hugging Face hub.
        layer: 0 is what goes into the first layer.
        device: "cpu", "cuda", "cuda:1" or "auto".

    Raises:
        TeacherError: it is no speech encoder, or cannot be loaded.
        UsageError: it has no such layer, or there is no such device.
    """
    source = str(Path(source).resolve()) if Path(source).exists() else source
    device = pick_device(device)
    encoder = load_encoder(source, device)
    if not 0 <= layer <= encoder.depth:
        expected = f"0 to {encoder.depth}, where 0 is what goes into the first layer"
        raise UsageError(f"{source} has no layer {layer}", expected=expected)
    settings = EncoderSettings(
        rate_hz=encoder.sample_rate_hz,
        bins=encoder.width,
        encoder=source,
        architecture=encoder.kind,
        weights=encoder.weights_hash(),
        layer=layer,
        frame_hz=encoder.rate_hz,
        offset_s=encoder.offset_s,
    )
    return EncoderMethod(settings, device, encoder)


def recorded_method(settings: Mapping[str, Any], device: str = "auto", source: str | None = None) -> EncoderMethod:
    """Load the encoder of a feature file's settings again, from `source` if it lies elsewhere now.

    Raises:
        TeacherError: it cannot be loaded.
        StaleError: it has other weights, or gives other rows for another reason.
    """
    recorded = EncoderSettings(**settings)
    method = encoder_method(source or recorded.encoder, recorded.layer, device)
    found = method.settings
    if differ := replace(found, weights="").differences({**settings, "weights": ""}):
        raise StaleError(f"the encoder gives other rows: {'; '.join(differ)}", where=found.encoder)
    _refuse_other_weights(found.encoder, recorded.weights, found.weights)
    return method


def _refuse_other_weights(source: str, recorded: str, found: str) -> None:
    """Raise StaleError if the hash of an encoder's weights is not the recorded one."""
    if found != recorded:
        what = f"the encoder has other weights: their hash is {found}, and {recorded} was recorded"
        raise StaleError(what, where=source, remedy="give the place of the recorded one with --encoder")
