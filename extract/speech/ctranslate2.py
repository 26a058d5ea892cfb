"""Read a CTranslate2 model of Whisper, as faster-whisper uses, and give its weights the names of transformers.

The file is a list of named arrays: a version, the name and revision of the kind of model, then for each array its name,
shape, type and bytes, then names that stand for another array. Numbers are little-endian. After version 6, CTranslate2
4 (https://github.com/OpenNMT/CTranslate2, python/ctranslate2/specs/model_spec.py).
Guarantees: every weight is the number that the file holds, and every array of the file is used or known to be none.
Try: `stillhouse teacher convert FOLDER OUT`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.errors import TeacherError
from ...data.files.atomic import read_plain

FILE = "model.bin"
VERSIONS = range(4, 7)
# By the number of a type in the file. 5 is bfloat16, whose bits are read as integers.
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16, 5: np.uint16}
_ATTENTION = {"linear_0": ("q_proj", "k_proj", "v_proj"), "linear_1": ("out_proj",)}
_CROSS = {"linear_0": ("q_proj",), "linear_1": ("k_proj", "v_proj"), "linear_2": ("out_proj",)}
_NORMS = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True)
class Whisper:
    """Weights and settings of transformers' WhisperForConditionalGeneration, and the types of the file's arrays."""

    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    types: dict[str, int]  # {type: number of arrays}


def read_arrays(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """Return the kind of model and its arrays by name. bfloat16 becomes float32.

    Raises TeacherError if the file is cut short, or not of this format.
    """
    try:
        data = read_plain(path)
    except OSError as e:
        raise TeacherError(f"cannot be read: {e.strerror}", where=path) from None
    at = 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    try:
        version = number("I")
        if version not in VERSIONS:
            expected = f"{VERSIONS[0]} to {VERSIONS[-1]}"
            raise TeacherError(f"version {version} of CTranslate2's format", where=path, expected=expected)
        kind, _ = text(), number("I")
        arrays: dict[str, np.ndarray] = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype, size = TYPES[number("B")], number("I")
            count = size // np.dtype(dtype).itemsize
            array = np.frombuffer(data, dtype, count, at).reshape(shape)
            at += size
            arrays[name] = _from_bfloat16(array) if dtype is np.uint16 else array
        for _ in range(number("I")):
            alias = text()
            arrays[alias] = arrays[text()]
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as e:
        raise TeacherError(f"not a CTranslate2 model, or one that is cut short: {e}", where=path) from None
    return kind, arrays


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_whisper(folder: Path) -> Whisper:
    """Read the model of a folder. Weights in 8 or 16 bits with scales become the float32 numbers that they stand for.

    Raises TeacherError if it is no Whisper, or holds something that this does not know.
    """
    path = folder / FILE
    kind, arrays = read_arrays(path)
    if kind != "WhisperSpec":
        raise TeacherError(f"a CTranslate2 model of kind {kind}", where=path, expected="Whisper (WhisperSpec)")
    types: dict[str, int] = {}
    for array in arrays.values():
        if array.ndim:
            types[str(array.dtype)] = types.get(str(array.dtype), 0) + 1
    left = dict(arrays)
    try:
        weights = _weights(left)
        config = _config(weights, arrays)
    except (KeyError, ValueError) as e:
        raise TeacherError(f"an array of Whisper is missing or has another shape: {e}", where=path) from None
    unknown = [name for name, array in left.items() if array.ndim]
    if unknown:
        raise TeacherError(f"arrays that are not Whisper's: {', '.join(sorted(unknown)[:5])}", where=path)
    tensors = {k: torch.from_numpy(v.copy()) for k, v in weights.items()}
    return Whisper(tensors, config, dict(sorted(types.items(), key=lambda kv: -kv[1])))


def _taken(left: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Take an array out of `left`, as numbers without a scale."""
    array = left.pop(name)
    scale = left.pop(f"{name}_scale", None)
    if scale is None:
        return array
    return array.astype(np.float32) / (scale[:, None] if scale.ndim else scale)


def _weights(left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights by the names of transformers. What is taken disappears from `left`."""
    found: dict[str, np.ndarray] = {}

    def take(source: str, *targets: str) -> None:
        """An array, or one that holds several below each other."""
        for target, part in zip(targets, np.split(_taken(left, source), len(targets)), strict=True):
            if target.endswith("k_proj.bias"):
                if part.any():
                    raise ValueError(f"{source} has a bias of keys, which Whisper has not")
                continue
            found[f"model.{target}"] = part

    def linear(source: str, *targets: str) -> None:
        for what in ("weight", "bias"):
            take(f"{source}/{what}", *(f"{t}.{what}" for t in targets))

    def norm(source: str, target: str) -> None:
        for theirs, ours in _NORMS.items():
            take(f"{source}/{theirs}", f"{target}.{ours}")

    def attention(source: str, target: str, parts: Mapping[str, tuple[str, ...]]) -> None:
        for part, names in parts.items():
            linear(f"{source}/{part}", *(f"{target}.{n}" for n in names))
        norm(f"{source}/layer_norm", f"{target}_layer_norm")

    for side in ("encoder", "decoder"):
        take(f"{side}/position_encodings/encodings", f"{side}.embed_positions.weight")
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        depth = 1 + max(
            int(n.split("/")[1][6:]) for n in left if n.startswith(f"{side}/layer_") and n[len(side) + 7].isdigit()
        )
        for k in range(depth):
            source, target = f"{side}/layer_{k}", f"{side}.layers.{k}"
            attention(f"{source}/self_attention", f"{target}.self_attn", _ATTENTION)
            if side == "decoder":
                attention(f"{source}/attention", f"{target}.encoder_attn", _CROSS)
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"encoder.{conv}")
    take("decoder/embeddings/weight", "decoder.embed_tokens.weight")
    projection = left.pop("decoder/projection/weight", None)
    left.pop("decoder/projection/weight_scale", None)
    tied = found["model.decoder.embed_tokens.weight"]
    if projection is not None and projection.shape != tied.shape:
        raise ValueError("decoder/projection/weight is not the embedding")
    return found


def _config(weights: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The settings of transformers' WhisperConfig that the shapes tell."""

    def depth(side: str) -> int:
        return 1 + max(int(n.split(".")[3]) for n in weights if n.startswith(f"model.{side}.layers."))

    width, bins = weights["model.encoder.conv1.weight"].shape[:2]
    vocabulary = len(weights["model.decoder.embed_tokens.weight"])
    end = 50256 if vocabulary == 51864 else 50257  # the end of text: the English vocabulary has one token less
    return {
        "d_model": int(width),
        "num_mel_bins": int(bins),
        "vocab_size": vocabulary,
        "encoder_layers": depth("encoder"),
        "decoder_layers": depth("decoder"),
        "encoder_attention_heads": int(arrays["encoder/num_heads"]),
        "decoder_attention_heads": int(arrays["decoder/num_heads"]),
        "encoder_ffn_dim": len(weights["model.encoder.layers.0.fc1.weight"]),
        "decoder_ffn_dim": len(weights["model.decoder.layers.0.fc1.weight"]),
        "max_source_positions": len(weights["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(weights["model.decoder.embed_positions.weight"]),
        "decoder_start_token_id": min(end + 1, vocabulary - 1),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), min(end, vocabulary - 1)),
    }
