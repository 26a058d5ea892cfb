"""A speech encoder as a teacher: what the pipeline of extraction asks of it, with one utterance in a pass.

Guarantees: the states of an utterance are those of `SpeechEncoder.states`. Audio that is not what the plan counted, or
not what other layers of the store were extracted from, is an error that names the utterance.
Try: `stillhouse extract CORPUS STORE --teacher WHISPER --layers 2,4`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...data.audio.read import resample
from ...data.errors import CorpusError, StaleError, UsageError
from ...data.manifest import Corpus, Utterance, read_manifest
from ..teacher.contexts import ItemWindows, KeptTokens
from ..teacher.loading import check_folder, commit_of, read_config
from ..teacher.model import Teacher, load_teacher, numbers_of_layers, pick_device
from ..teacher.passes import Passes
from .encoder import SpeechEncoder, is_speech, load_encoder
from .sounds import Sounds, measure, read_sound, segment_source

ALONE = "alone"  # the context of a speech teacher
_REFRESH = "give the same command with --refresh"


@dataclass
class SoundWindow:
    """One utterance's audio: a row of a batch. When it has been read, its hash is in `hashes`."""

    utterance: Utterance
    corpus: Corpus
    size: int  # frames
    kept: list[KeptTokens]
    hashes: np.ndarray  # uint64, of the work item's utterances
    known: int = 0  # the hash that other layers of the store were extracted from; 0: there are none
    blocks: None = None

    def hash_samples(self) -> tuple[np.ndarray, int]:
        """Put the hash of the samples into `hashes`, and return them and their rate. Raises as `samples`."""
        samples, own_hz, hashed = read_sound(self.corpus, self.utterance)
        if self.known and hashed != self.known:
            what = "its audio has changed since other layers of this store were extracted"
            raise StaleError(what, where=self.utterance.id, remedy=f"restore it, or {_REFRESH}")
        for kept in self.kept:
            self.hashes[kept.utterance] = hashed
        return samples, own_hz

    def samples(self, rate_hz: int) -> np.ndarray:
        """Return the samples, float32 [S]. Raises AudioError, or StaleError if they have changed."""
        samples, own_hz = self.hash_samples()
        return resample(samples, own_hz, rate_hz)


class SpeechTeacher:
    """A loaded speech encoder, and the corpus that it reads the audio of. Its attributes are those of `Teacher`."""

    kind = "speech"
    tokeniser = None  # It reads no text.

    def __init__(self, encoder: SpeechEncoder, corpus: Corpus, revision: str | None = None) -> None:
        self.encoder, self.corpus, self.revision = encoder, corpus, revision
        self.source, self.device, self.dtype = encoder.source, encoder.device, encoder.dtype
        self.architecture, self.depth, self.width = encoder.kind, encoder.depth, encoder.width
        self.window = round(encoder.longest_s * encoder.rate_hz)
        self.passes = Passes("single")
        self.about = ""

    def layer_numbers(self, asked: Sequence[int]) -> list[int]:
        """Return layers as ascending numbers; negative ones count from the end. Raises UsageError out of range."""
        return numbers_of_layers(asked, self.depth, self.source)

    def weights_hash(self) -> str:
        """Return the hash of the encoder's weights and of its feature extractor's settings."""
        return self.encoder.weights_hash()

    def clone_model(self) -> SpeechTeacher:
        """Return a teacher for another thread, with the same weights."""
        clone = copy.copy(self)
        clone.encoder = self.encoder.clone_model()
        return clone

    def measure(self, utterances: Sequence[Utterance | None]) -> Sounds:
        """Return frames and audio of utterances of the corpus. None has none. Raises AudioError as `sounds.measure`."""
        return measure(self.corpus, utterances, self.encoder)

    def windows(
        self, ids: Sequence[str], length: np.ndarray, source: np.ndarray | None = None, known: np.ndarray | None = None
    ) -> ItemWindows:
        """Return the windows of utterances: one for each that has frames.

        Arguments:
            ids: the utterances.
            length: int [U], frames of each; 0 for one that is not to be run.
            source: int64 [U, 4], the audio as the plan knows it, which must have the same times and channel.
            known: uint64 [U], the hash of audio of which a layer is extracted; 0: none is.

        Raises StaleError if an utterance is not in the corpus any more, or has other times.
        """
        nothing = np.zeros(len(ids), np.int32)
        item = ItemWindows([], np.zeros(len(ids), np.uint64), nothing, nothing)
        for u in np.flatnonzero(length).tolist():
            utterance = self.corpus.by_id.get(ids[u])
            if utterance is None or utterance.audio is None:
                what = f"the corpus {self.corpus.path} has no audio of it any more"
                raise StaleError(what, where=ids[u], remedy=f"restore it, or {_REFRESH}")
            if source is not None and tuple(source[u, 1:].tolist()) != segment_source(utterance, 0)[1:]:
                what = f"its times or its channel in {self.corpus.path} have changed since it was planned"
                raise StaleError(what, where=ids[u], remedy=f"restore them, or {_REFRESH}")
            frames = int(length[u])
            kept, hashed = [KeptTokens(u, 0, frames, 0)], 0 if known is None else int(known[u])
            window = SoundWindow(utterance, self.corpus, frames, kept, item.input_hash, hashed)
            item.windows.append(window)
        return item

    def states(self, windows: Sequence[SoundWindow], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the states of one window: {layer: float32 [1, T, D] on the device}.

        Raises AudioError if the audio cannot be read, or StaleError if it has other frames than were planned.
        """
        (window,) = windows
        id = window.utterance.id
        found = self.encoder.tensors(window.samples(self.encoder.sample_rate_hz), layers, id=id)
        frames = len(next(iter(found.values())))
        if frames != window.size:
            what = f"its audio gives {frames} frames, and its header promised {window.size} when it was planned"
            raise StaleError(what, where=id, remedy=f"if the audio has changed, {_REFRESH}")
        return {k: states[None] for k, states in found.items()}


AnyTeacher = Teacher | SpeechTeacher


def load_any_teacher(
    source: str,
    *,
    corpus: Corpus | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    window: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> AnyTeacher:
    """Load a text teacher or a speech teacher, whichever the model's configuration says.

    `corpus`, or the path of its manifest, is where a speech teacher finds its audio. The other arguments and errors are
    those of `load_teacher`. Raises UsageError for what a speech teacher does not have.
    """
    check_folder(source)
    config = read_config(source, revision)
    if config is None or not is_speech(config):
        return load_teacher(
            source, device=device, dtype=dtype, window=window, revision=revision, trust_remote_code=trust_remote_code
        )
    for option, given in (("--trust-remote-code", trust_remote_code), ("--window", window is not None)):
        if given:
            raise UsageError(f"a speech teacher has no {option}", where=source, remedy="give the command without it")
    if corpus is None:
        raise CorpusError("a speech teacher needs the audio of a corpus", where=source)
    corpus = corpus if isinstance(corpus, Corpus) else read_manifest(corpus)
    encoder = load_encoder(source, pick_device(device), dtype, revision)
    return SpeechTeacher(encoder, corpus, commit_of(source, revision))
