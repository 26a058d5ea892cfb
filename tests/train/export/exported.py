"""What the tests of the exports share: runs that emit units freely, speech, and sherpa-onnx over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.data.audio.fbank import fbank
from stillhouse.data.audio.read import read_audio
from stillhouse.data.units import Units
from stillhouse.train.config import Config, dump_config
from stillhouse.train.decode.greedy import greedy
from stillhouse.train.model.build import build_model
from stillhouse.train.model.transducer import BLANK, Transducer
from stillhouse.train.run import checkpoint

LETTERS = Units("characters", "none", ["<blank>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz'"])


def sharpened(model: Transducer) -> Transducer:
    """Random weights that are sure of what they say, and say it in bursts: up to eight units a frame."""
    with torch.no_grad():
        model.encoder.feature_mean.fill_(-8.0)
        model.encoder.feature_std.fill_(4.0)
        model.joint.output.weight.mul_(8.0)
        model.joint.output.bias[BLANK] += 6.0
    return model.eval()


def untrained_run(folder: Path, units: Units = LETTERS, loss: dict[str, Any] | None = None, **model: Any) -> Path:
    """A run folder as training leaves it, with a checkpoint of a sharpened model."""
    small = {"dim": 16, "layers": 1, "heads": 2, "inner": 32, "kernel": 5, "predictor_dim": 16, "joint_dim": 16}
    files = {"corpus": "corpus.jsonl", "features": folder / "absent.h5", "units": folder / "units"}
    config = Config.model_validate({"data": files, "model": {**small, **model}, "loss": loss or {}})
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump_config(config))
    units.save(folder / "units")
    weights = sharpened(build_model(config, units.size)).state_dict()
    transfer = {"heads.0.weight": torch.zeros(3, 16)}
    checkpoint.save(folder / "checkpoints", {"step": 7, "best": {}}, {"model": weights, "transfer": transfer})
    return folder


def speech(corpora: Path, source: str, count: int = 2) -> list[np.ndarray]:
    """Real utterances at 16 kHz, float32, of various speakers or of one."""
    if source == "kathleen":
        paths = sorted((corpora / "kathleen-arctic" / "wav16k").glob("*.ogg"))
    else:
        paths = sorted((corpora / "librispeech-subset").rglob("*.flac"))
    return [read_audio(p)[: 16_000 * 5] for p in paths[:: len(paths) // count][:count]]


def sherpa_texts(folder: Path, audio: Sequence[np.ndarray], suffix: str = "", **options: Any) -> list[str]:
    """What sherpa-onnx hears in each, all decoded in one batch."""
    import sherpa_onnx

    recogniser = sherpa_onnx.OfflineRecognizer.from_transducer(**{**_files(folder, suffix), **options})
    streams = []
    for samples in audio:
        streams.append(recogniser.create_stream())
        streams[-1].accept_waveform(16_000, samples)
    recogniser.decode_streams(streams)
    return [stream.result.text for stream in streams]


def sherpa_streamed(folder: Path, samples: np.ndarray, piece: int) -> str:
    """What sherpa-onnx hears of samples that arrive in pieces."""
    import sherpa_onnx

    recogniser = sherpa_onnx.OnlineRecognizer.from_transducer(**_files(folder, ""))
    stream = recogniser.create_stream()
    for begin in range(0, len(samples), piece):
        stream.accept_waveform(16_000, samples[begin : begin + piece])
        while recogniser.is_ready(stream):
            recogniser.decode_stream(stream)
    stream.input_finished()
    while recogniser.is_ready(stream):
        recogniser.decode_stream(stream)
    return recogniser.get_result(stream)


def _files(folder: Path, suffix: str) -> dict[str, Any]:
    parts = {name: str(folder / f"{name}{suffix}.onnx") for name in ("encoder", "decoder", "joiner")}
    return {**parts, "tokens": str(folder / "tokens.txt"), "num_threads": 1, "decoding_method": "greedy_search"}


@torch.no_grad()
def our_text(model: Transducer, units: Units, samples: np.ndarray, frames: int | None = None) -> str:
    """What our own greedy search hears in the first `frames` frames (None: in all)."""
    features = torch.from_numpy(fbank(samples))[:frames]
    found = greedy(model, *model.encode(features[None], torch.tensor([len(features)])))
    return units.decode(found[0])
