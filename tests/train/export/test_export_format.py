"""ONNX files have an old format, and their inputs and outputs are those of the guide."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from stillhouse.data.errors import ExportError
from stillhouse.train.export.export import export_run
from stillhouse.train.export.graphs import Graph
from stillhouse.train.export.torch import checked

from .exported import untrained_run

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guide" / "export.md"
TYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
KINDS = {
    "stateless": ({}, {}, False),
    "streaming": ({"chunk_frames": 32}, {}, True),
    "lstm and durations": ({"predictor": "lstm"}, {"kind": "tdt"}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_and_the_guide(tmp_path: Path, kind: str) -> None:
    model, loss, streaming = KINDS[kind]
    run = untrained_run(tmp_path / "run", loss=loss, **model)
    found = export_run(run, tmp_path / "onnx", "onnx", streaming=streaming, int8=True)
    parts = ["decoder", "encoder", "joiner", *(["joiner.beam"] if found.symbols_per_frame > 1 else [])]
    assert [n for n in found.files if n.endswith(".int8.onnx")] == sorted(f"{p}.int8.onnx" for p in parts)
    guide = GUIDE.read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:5]]
        for line in guide.splitlines()
        if line.startswith("| `") and line.count("|") == 6
    ]
    sizes = {"N": "N", "bins": 80, "joint": 16, "context": 2, "V": found.units, "dim": 16, "D": 5, "T": "T"}
    for path in sorted((tmp_path / "onnx").glob("*.onnx")):
        proto = onnx.load(path)
        # The guide says that onnxruntime 1.14 reads them: it has opset 18 and IR version 8.
        assert proto.ir_version == 8
        assert [entry.version for entry in proto.opset_import if not entry.domain] == [18]
        assert {entry.domain for entry in proto.opset_import} <= {"", "com.microsoft"}
        part = path.name.split(".")[0]
        for entry in proto.metadata_props:
            assert f"`{entry.key}`" in guide, entry.key
        if streaming and part == "encoder":
            for value in (*proto.graph.input, *proto.graph.output):
                assert f"`{value.name}`" in guide
            continue
        for direction, values in (("input", proto.graph.input), ("output", proto.graph.output)):
            for value in values:
                shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
                fits = []
                for file, tensor, dims, kind_of in rows:
                    if file == f"`{part}`" and tensor.startswith(direction) and f"`{value.name}`" in tensor:
                        fits.append(TYPES[value.type.tensor_type.elem_type] == kind_of)
                        names = re.findall(r"\w+", dims)
                        fits[-1] &= len(names) == len(shape)
                        fits[-1] &= all(n == "S" or sizes[n] == size for n, size in zip(names, shape))
                assert any(fits), (path.name, value.name, shape)


def test_states_differ_by_shares_of_their_largest_number(tmp_path: Path) -> None:
    """Those of a speech encoder have any size, and their small numbers come from large ones."""
    graph = Graph("frontend", torch.nn.Identity(), lambda n: {"x": torch.tensor([0.5, 200.0 * n])}, {}, ("y",))

    def run(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [inputs["x"] + torch.tensor([0.001, 0.0])]

    assert 0 < checked(replace(graph, of_largest=True), run, tmp_path) < 1e-5
    with pytest.raises(ExportError, match="differ from torch's by"):
        checked(graph, run, tmp_path)
