"""Streaming exports: chunk by chunk what the model says of the whole, in onnxruntime, in sherpa-onnx and in torch."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from stillhouse.train.export.export import export_run
from stillhouse.train.export.onnx import run_onnx
from stillhouse.train.export.streaming import StreamGraph, stream_graph
from stillhouse.train.export.torch import write_torch
from stillhouse.train.model.transducer import Transducer
from stillhouse.train.run.load import load_run

from .exported import our_text, sharpened, sherpa_streamed, speech, untrained_run

CHUNK = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "run"
    return untrained_run(folder, chunk_frames=CHUNK, left_chunks=2)


@pytest.fixture(scope="module")
def onnx_folder(run: Path) -> Path:
    found = export_run(run, run.parent / "onnx", "onnx", streaming=True)
    assert found.unfit_for_sherpa is None and found.streaming and found.difference < 1e-5
    return run.parent / "onnx"


def metadata(path: Path) -> dict[str, str]:
    return {p.key: p.value for p in onnx.load(path).metadata_props}


def test_onnxruntime_chunk_by_chunk_equals_the_whole(run: Path, onnx_folder: Path) -> None:
    """As a program would that knows the metadata only."""
    model, *_ = load_run(run)
    path = onnx_folder / "encoder.onnx"
    about = metadata(path)
    size = {name: int(value) for name, value in about.items() if value.isdigit()}
    assert about["model_type"] == "conformer" and size["T"] == size["decode_chunk_len"] == CHUNK
    torch.manual_seed(3)
    n, chunks, k = 3, 5, size["symbols_per_frame"]
    x = 3 * torch.randn(n, chunks * CHUNK, 80) - 8
    caches = [
        torch.zeros(size["num_encoder_layers"], rows, n, size["encoder_dim"])
        for rows in (size["left_context"], size["cnn_module_kernel"] - 1)
    ]
    found = []
    for c in range(chunks):
        inputs = {
            "x": x[:, c * CHUNK : (c + 1) * CHUNK].contiguous(),
            "cached_attn": caches[0],
            "cached_conv": caches[1],
        }
        out, *caches = run_onnx(path, {**inputs, "processed_lens": torch.full((n,), c * CHUNK)})
        found.append(out[:, ::k])
    with torch.no_grad():
        states, _ = model.encode(x, torch.full((n,), chunks * CHUNK))
        torch.testing.assert_close(torch.cat(found, 1), model.joint.encoder(states), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("source", "piece"), [("kathleen", 1_000), ("librispeech", 7_777)])
def test_sherpa_onnx_streams_what_decode_says(
    run: Path, onnx_folder: Path, corpora: Path, source: str, piece: int
) -> None:
    pytest.importorskip("sherpa_onnx")
    model, units, *_ = load_run(run)
    for samples in speech(corpora, source):
        # It asks for one frame more than a chunk, and what does not fill a chunk is never heard
        heard = (round(len(samples) / 160) - 1) // CHUNK * CHUNK
        expected = our_text(model, units, samples, heard).strip()
        assert sherpa_streamed(onnx_folder, samples, piece) == expected
        assert len(expected) > 30


@pytest.mark.parametrize(
    ("layers", "left", "kernel", "chunk", "subsampling"), [(2, 0, 5, 12, 4), (0, 2, 1, 8, 8), (1, 3, 1, 6, 2)]
)
def test_any_state_travels_in_the_two_caches(layers: int, left: int, kernel: int, chunk: int, subsampling: int) -> None:
    torch.manual_seed(0)
    shape = {"dim": 16, "layers": layers, "heads": 2, "inner": 16, "kernel": kernel, "subsampling": subsampling}
    model = sharpened(Transducer(9, {**shape, "causal": True}, predictor_dim=16, joint_dim=16))
    graph = StreamGraph(model, 1, chunk, left)
    x = 3 * torch.randn(2, 6 * chunk, 80) - 8
    state, caches = model.encoder.stream_state(2, chunk_frames=chunk, left_chunks=left), graph.caches(2)
    with torch.no_grad():
        for c in range(6):
            part = x[:, c * chunk : (c + 1) * chunk]
            expected, state = model.encoder.stream(part, state)
            found, *caches = graph(part, *caches, torch.full((2,), c * chunk))
            assert torch.equal(found, model.joint.encoder(expected))


@pytest.mark.slow
def test_other_chunks_than_the_models_own_as_a_program_of_torch(run: Path, tmp_path: Path) -> None:
    model, *_ = load_run(run)
    graph = stream_graph(model, symbols=1, chunk_frames=8, left_chunks=1)
    graph.module.eval()
    assert write_torch(graph, tmp_path / "encoder.pt2") == 0.0
    assert graph.inputs(2)["x"].shape == (2, 8, 80)
