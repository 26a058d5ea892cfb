"""A Hugging Face speech encoder: the hidden states of chosen layers over audio, one utterance in a pass.

Guarantees: the state of layer k equals plain transformers' `hidden_states[k]` of the utterance alone. The model stops
behind the highest layer asked for. At loading both ways run on some noise, and if they differ the plain way is
used. No code of a model's repository runs, and no pickle is read.
Try: `pytest tests/extract/speech/test_encoder.py`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.errors import AudioError, TeacherError, UsageError
from ..teacher.loading import DTYPES, check_folder, first_line, objections, refuse_missing
from ..teacher.model import hash_weights, pick_device
from .windows import AudioWindow, audio_windows

LONGEST_S = 60.0  # longer audio goes through in windows, because attention grows with the square of the length
OVERLAP_S = 6.0
UNUSED = ("masked_spec_embed",)  # weights of the training alone
SILENCE_S = 0.5  # behind the audio for Whisper, which expects silence there


_EXPECTED = "the feature extractor that belongs to the model"
_COPY = "copy preprocessor_config.json of the model into the folder"


class _Enough(Exception):
    """Raised by a hook before the first layer that is not needed."""


@dataclass(frozen=True)
class Framing:
    """How an encoder cuts audio into frames.

    stride      samples between two frames
    middle      the sample in the middle of frame 0
    count       returns the frames of so many samples in one pass: 0 where they are too few for the encoder
    """

    stride: int
    middle: float
    count: Callable[[int], int]


def _convolved(config: Any, _: Any) -> Framing:
    """wav2vec 2.0 and kin: convolutions over samples, without padding."""
    layers = list(zip(config.conv_kernel, config.conv_stride, strict=True))
    stride, field = 1, 1
    for kernel, step in layers:
        field, stride = field + (kernel - 1) * stride, stride * step

    def count(samples: int) -> int:
        for kernel, step in layers:
            samples = (samples - kernel) // step + 1
        return max(0, samples)

    return Framing(stride, (field - 1) / 2, count)


def _whisper(_: Any, extractor: Any) -> Framing:
    """Log-mel frames around every hop, of which convolutions take every second one. Silence fills the last frame."""
    stride = 2 * extractor.hop_length
    return Framing(stride, 0.0, lambda samples: -(-samples // stride))


def _parakeet(config: Any, extractor: Any) -> Framing:
    """Log-mel frames around every hop, of which padded convolutions take every second one, several times."""
    times, hop = (config.subsampling_factor - 1).bit_length(), extractor.hop_length
    kernel, step = config.subsampling_conv_kernel_size, config.subsampling_conv_stride

    def count(samples: int) -> int:
        frames = (samples + extractor.n_fft // 2 * 2 - extractor.n_fft) // hop
        if frames < 2:  # One frame has no deviation, by which they are divided.
            return 0
        for _ in range(times):
            frames = (frames + (kernel - 1) // 2 * 2 - kernel) // step + 1
        return frames

    return Framing(hop * config.subsampling_factor, 0.0, count)


def _stacked_mel(_: Any, extractor: Any) -> Framing:
    """w2v-BERT 2.0: `stride` frames of 25 ms every 10 ms, side by side, with an even number of them."""
    hop, window = (round(extractor.sampling_rate * s) for s in (0.010, 0.025))

    def count(samples: int) -> int:
        frames = (samples - window) // hop + 1
        return 0 if frames < 2 else (frames + frames % 2) // extractor.stride  # One frame has no deviation.

    return Framing(hop * extractor.stride, (window - 1) / 2 + hop * (extractor.stride - 1) / 2, count)


# By model_type: how it frames audio. What is not here is refused.
FRAMINGS: dict[str, Callable[[Any, Any], Framing]] = {
    **dict.fromkeys(
        ("wav2vec2", "hubert", "wavlm", "data2vec-audio", "unispeech", "unispeech-sat", "wav2vec2-conformer"),
        _convolved,
    ),
    "whisper": _whisper,
    "wav2vec2-bert": _stacked_mel,
    "parakeet_encoder": _parakeet,
}


def is_speech(config: Any) -> bool:
    """Return whether a model of this configuration reads audio."""
    return config.model_type in FRAMINGS or _inner(config) is not config


def _inner(config: Any) -> Any:
    """The configuration of the encoder inside a recogniser such as Parakeet's."""
    inner = getattr(config, "encoder_config", None)
    return inner if getattr(inner, "model_type", None) in FRAMINGS else config


def encoder_of(model: Any) -> Any:
    """Return the encoder of a model that reads audio, which may be the model itself."""
    return model.get_encoder() if _inner(model.config).model_type in ("whisper", "parakeet_encoder") else model


class SpeechEncoder:
    """A loaded speech encoder.

    depth           number of layers L; layer 0 is what goes into the first one
    width           size D of a state
    sample_rate_hz  rate of the samples that it takes
    rate_hz         frames in a second
    offset_s        time of the middle of frame 0
    longest_s       longest audio that goes through whole; longer audio goes through in windows
    """

    def __init__(
        self, encoder: Any, extractor: Any, *, source: str, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        self.source, self.device, self.dtype, self._extractor = source, device, dtype, extractor
        self.config = encoder.config
        self.kind: str = self.config.model_type
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        if getattr(extractor, "dither", 0.0):
            extractor.dither = 0.0  # it adds random numbers, and no two passes would give the same states
        self.sample_rate_hz = int(extractor.sampling_rate)
        self.framing = FRAMINGS[self.kind](self.config, extractor)
        self.rate_hz = self.sample_rate_hz / self.framing.stride
        self.offset_s = self.framing.middle / self.sample_rate_hz
        self.longest_s = LONGEST_S
        if self.kind == "whisper":
            self.positions = self.encoder.embed_positions.weight.detach().clone()
            self.longest_s = len(self.positions) * self.framing.stride / self.sample_rate_hz - SILENCE_S
        self._lock = threading.Lock()
        self._layers: list[torch.nn.Module] | None = None
        self._stack = ""  # the name of `_layers`
        self._last_is_normed = True  # whether a final normalisation is part of the last state
        count = int(min(1.0, self.longest_s) * self.sample_rate_hz)
        noise = np.random.default_rng(0).standard_normal(count).astype(np.float32) * 0.1
        plain = self._plain(noise)
        self.depth, self.width = len(plain) - 1, int(plain[-1].shape[-1])
        self._layers = self._find_layers(noise, plain)

    def states(self, samples: np.ndarray, layers: Sequence[int], *, id: str = "") -> np.ndarray:
        """Return the states of an utterance, float32 [layers, T, D].

        Arguments:
            samples: float32 [S] in [-1, 1], at `sample_rate_hz`.
            layers: numbers from 0 to `depth`.
            id: the utterance's id, for errors.

        Raises:
            AudioError: the audio is too short for a frame, or the model's states are not finite.
        """
        found = self.tensors(samples, layers, id=id)
        return torch.stack([found[k] for k in layers]).cpu().numpy()

    def tensors(self, samples: np.ndarray, layers: Sequence[int], *, id: str = "") -> dict[int, torch.Tensor]:
        """Return what `states` returns as {layer: float32 [T, D] on the device}."""
        for layer in layers:
            if not 0 <= layer <= self.depth:
                raise UsageError(f"layer {layer} of {self.source}", expected=f"0 to {self.depth}")
        samples = np.ascontiguousarray(samples, np.float32)
        if not self.frames(len(samples)):
            seconds = len(samples) / self.sample_rate_hz
            what = f"the encoder gives no frame: {seconds:.4f} s of audio is too short"
            raise AudioError(what, where=id or self.source)
        parts: dict[int, list[torch.Tensor]] = {k: [] for k in layers}
        for w in self._windows(len(samples)):
            try:
                found = self._run(samples[w.start : w.stop], layers)
            except torch.cuda.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as e:
                what = f"the encoder fails on {(w.stop - w.start) / self.sample_rate_hz:.3f} s of audio: {e}"
                raise AudioError(what, where=id or self.source, expected="audio of at least a few frames") from None
            for k, states in found.items():
                parts[k].append(states[w.first : w.last])
        joined = {k: torch.cat(states) for k, states in parts.items()}
        if not all(bool(torch.isfinite(states).all()) for states in joined.values()):
            raise AudioError("the encoder gives states that are not finite", where=id or self.source)
        return joined

    def frames(self, samples: int) -> int:
        """Return how many frames `states` gives of so many samples; 0: they are too few for the encoder."""
        windows = self._windows(samples)
        counts = [self.framing.count(w.stop - w.start) if w.last is None else w.last for w in windows]
        return sum(max(0, count - w.first) for count, w in zip(counts, windows))

    def _windows(self, samples: int) -> list[AudioWindow]:
        overlap_s = min(OVERLAP_S, self.longest_s / 4)  # of an encoder that takes a few seconds alone
        most, overlap = (int(s * self.sample_rate_hz) for s in (self.longest_s, overlap_s))
        return audio_windows(samples, most, overlap, self.framing.stride)

    def clone_model(self) -> SpeechEncoder:
        """Return an encoder for another thread: the same weights in its own modules, because passes hook them."""
        clone = copy.copy(self)
        shared = {id(t): t for t in self.encoder.parameters()}
        if self.kind == "whisper":
            del shared[id(self.encoder.embed_positions.weight)]  # `_fitted` cuts it to the audio of one pass
        clone.encoder, clone._extractor = copy.deepcopy(self.encoder, shared), copy.deepcopy(self._extractor)
        clone.config = clone.encoder.config
        clone._layers = None if self._layers is None else list(clone.encoder.get_submodule(self._stack))  # type: ignore[arg-type]
        clone._lock = threading.Lock()
        return clone

    def input_hash(self) -> str:
        """Return a hash of what turns audio into the model's input: its extractor's settings, silence and windows."""
        silence = SILENCE_S if self.kind == "whisper" else 0.0
        settings = self._settings(), self.sample_rate_hz, silence, self.longest_s, OVERLAP_S
        return hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()

    def weights_hash(self) -> str:
        """Return a hash of the weights, by name, and of the feature extractor's settings."""
        return hashlib.blake2b(f"{self._settings()}\n{hash_weights(self.encoder)}".encode(), digest_size=16).hexdigest()

    def _settings(self) -> str:
        return json.dumps(self._extractor.to_dict(), sort_keys=True, default=str)

    def _run(self, samples: np.ndarray, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        with self._lock:  # one pass at a time, because it hooks the layers
            hidden = self._plain(samples) if self._layers is None else self._hooked(samples, set(layers))
            return {k: hidden[k][0].float() for k in set(layers)}

    def inputs(self, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """Return what the model takes, by name, of one utterance or window: samples float32 [S]."""
        options: dict[str, Any] = {}
        if self.kind == "whisper":
            stride = self.framing.stride
            frames = -(-len(samples) // stride) + int(SILENCE_S * self.sample_rate_hz) // stride
            samples = np.pad(samples, (0, frames * stride - len(samples)))
            options = {"padding": False}
        found = self._extractor(samples, sampling_rate=self.sample_rate_hz, return_tensors="pt", **options)
        return {k: v.to(self.device) for k, v in found.items()}

    @contextlib.contextmanager
    def _fitted(self, inputs: dict[str, torch.Tensor]) -> Iterator[None]:
        """Whisper takes 30 s alone. With as many positions as this audio has frames, it takes this audio alone."""
        if self.kind != "whisper":
            yield
            return
        frames = inputs["input_features"].shape[-1] // 2
        table = self.encoder.embed_positions
        whole = (table.weight.data, table.num_embeddings, self.encoder.config.max_source_positions)
        try:
            table.weight.data, table.num_embeddings = self.positions[:frames].to(self.device), frames
            self.encoder.config.max_source_positions = frames
            yield
        finally:
            table.weight.data, table.num_embeddings, self.encoder.config.max_source_positions = whole

    def _forward(self, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        autocast = torch.autocast(self.device.split(":")[0], dtype=DTYPES[self.dtype], enabled=self.dtype != "float32")
        # On a GPU, convolutions round to 10 bits unless this is off, and rows would depend on the device.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), autocast, exact, self._fitted(inputs):
            return self.encoder(**inputs, **options)

    def _kept(self, samples: np.ndarray, inputs: dict[str, torch.Tensor]) -> int | None:
        """The frames that belong to the audio, of all that the model gives. None: all."""
        if self.kind == "whisper":
            return -(-len(samples) // self.framing.stride)
        if self.kind == "parakeet_encoder":
            return int(self.encoder._get_subsampling_output_length(inputs["attention_mask"].sum(-1)))
        return None

    def _plain(self, samples: np.ndarray) -> list[torch.Tensor]:
        inputs = self.inputs(samples)
        kept = self._kept(samples, inputs)
        return [h[:, :kept] for h in self._forward(inputs, output_hidden_states=True).hidden_states]

    def _hooked(self, samples: np.ndarray, layers: set[int]) -> dict[int, torch.Tensor]:
        """Return the states of `layers` by number, without the layers behind the highest."""
        assert self._layers is not None
        found: dict[int, torch.Tensor] = {}
        highest = max(layers)

        def take(number: int) -> Callable[..., None]:
            def hook(_: Any, args: tuple, kwargs: dict) -> None:
                found[number] = args[0] if args else kwargs["hidden_states"]
                if number == highest:
                    raise _Enough

            return hook

        def last(_: Any, __: tuple, output: Any) -> None:
            found[self.depth] = output[0] if isinstance(output, tuple) else output

        with contextlib.ExitStack() as stack:
            for number in layers - {self.depth}:
                handle = self._layers[number].register_forward_pre_hook(take(number), with_kwargs=True)
                stack.callback(handle.remove)
            if self.depth in layers and not self._last_is_normed:
                handle = self._layers[-1].register_forward_hook(last)
                stack.callback(handle.remove)
            inputs, result = self.inputs(samples), None
            with contextlib.suppress(_Enough):
                result = self._forward(inputs)
        if self.depth in layers and self._last_is_normed:
            assert result is not None
            found[self.depth] = result.last_hidden_state
        kept = self._kept(samples, inputs)
        return {k: h[:, :kept] for k, h in found.items()}

    def _find_layers(self, noise: np.ndarray, plain: list[torch.Tensor]) -> list[torch.nn.Module] | None:
        """The stack whose inputs are the hidden states, or None where no stack reproduces them."""
        for name, module in self.encoder.named_modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.depth:
                self._stack, self._layers = name, list(module)
                for self._last_is_normed in (True, False):
                    found = self._hooked(noise, set(range(self.depth + 1)))
                    if all(k in found and torch.equal(found[k], plain[k]) for k in range(self.depth + 1)):
                        return self._layers
        return None


def load_encoder(
    source: str, device: str = "cpu", dtype: str = "float32", revision: str | None = None
) -> SpeechEncoder:
    """Load a speech encoder from a folder or by its name on the Hugging Face hub.

    Arguments:
        device: "cpu", "cuda", "cuda:1" or "auto".
        dtype: "float32", or what matrix products and convolutions are rounded to: "bfloat16" or "float16".
        revision: of a model on the hub.

    Raises:
        TeacherError: it cannot be loaded, is no known speech encoder, or has no feature extractor that fits it.
        UsageError: there is no such device.
    """
    check_folder(source)
    device = pick_device(device)
    options: dict[str, Any] = {} if Path(source).is_dir() else {"revision": revision}
    with objections(source, options):
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(source, **options)
        if not is_speech(config):
            what = f"a model of type {config.model_type} is no speech encoder that is known here"
            raise TeacherError(what, where=source, expected=", ".join(FRAMINGS))
        extractor = _extractor(source, options)
        model, info = AutoModel.from_pretrained(
            source, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    encoder = encoder_of(model)
    own = {id(p) for p in encoder.parameters()}
    named = dict(model.named_parameters())
    refuse_missing((k for k in info["missing_keys"] if k not in UNUSED and id(named.get(k)) in own), source)
    try:
        return SpeechEncoder(encoder, extractor, source=source, device=device, dtype=dtype)
    except torch.cuda.OutOfMemoryError as e:
        what, remedy = "it does not fit into the device's memory", "give --device cpu, or a smaller model"
        raise TeacherError(what, where=source, remedy=remedy) from e
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        what = f"it fails on a second of noise, with the feature extractor {type(extractor).__name__}: {first_line(e)}"
        raise TeacherError(what, where=source, expected=_EXPECTED, remedy=_COPY) from e


def _extractor(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as e:
        what = f"it has no feature extractor: {first_line(e)}"
        raise TeacherError(what, where=source, expected=_EXPECTED, remedy=_COPY) from None
