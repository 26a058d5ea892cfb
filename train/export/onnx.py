"""Graphs as ONNX files, the tokens.txt that sherpa-onnx reads, and 8-bit copies.

Guarantees: onnxruntime has run each written file on random inputs of other sizes than the traced ones, and its outputs
are torch's to 1e-4.
Try: `stillhouse export RUN --format onnx --out FOLDER`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...data.errors import ExportError, UsageError
from ...data.units import BLANK, UNKNOWN, UNKNOWN_TEXT, Units
from ..decode.hotwords import space_unit
from .graphs import Graph
from .torch import checked, traced

OPSET, IR_VERSION = 18, 8  # onnxruntime reads them from version 1.14 on, and the exporter writes no older operators


def need_onnx() -> None:
    """Raise UsageError, which names the extra, if a package is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UsageError(
            f"--format onnx needs a package that is not installed ({e})", remedy="pip install 'stillhouse[onnx]'"
        ) from None


def write_onnx(graph: Graph, path: Path) -> float:
    """Write the graph, and return the largest difference of onnxruntime's outputs from torch's."""
    import onnx

    with _quiet():
        program = torch.onnx.export(
            traced(graph),
            (),
            dynamo=True,
            input_names=list(graph.axes),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _tidy(proto, graph)
    onnx.helper.set_model_props(proto, graph.metadata)
    _save(proto, path)
    return checked(graph, lambda inputs: run_onnx(path, inputs), path)


def run_onnx(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Run a graph once, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def write_int8(source: Path, path: Path) -> None:
    """Write a copy whose matrix products and embeddings have 8-bit weights. Activations are quantised at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(source), str(path), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"]
        )
    _save(onnx.load(str(path)), path)


def _save(proto: Any, path: Path) -> None:
    """Write a graph in the oldest file format that holds its operators. Raises ExportError if a newer one is needed."""
    import onnx

    opset = max(entry.version for entry in proto.opset_import if not entry.domain)
    if opset > OPSET:
        raise ExportError(f"the exporter wrote operators of opset {opset}", where=path, expected=f"{OPSET} or less")
    proto.ir_version = IR_VERSION
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def tokens_txt(units: Units) -> str:
    """Return lines `SYMBOL ID`. sherpa-onnx turns a leading ▁ into a space, for sentencepiece and for characters.

    The unknown unit is spelled as `stillhouse decode` spells it, because sherpa-onnx takes <unk> for a second blank.
    Raises ExportError if a unit has white space.
    """
    lines = []
    for k, piece in enumerate(units.pieces):
        symbol = {BLANK: "<blk>", UNKNOWN: UNKNOWN_TEXT}.get(k, piece)
        if not symbol or re.search(r"[ \t\n\v\f\r\0]", symbol):
            expected = "no white space, which separates the columns of tokens.txt"
            raise ExportError(f"unit {k} is {symbol!r}", expected=expected)
        lines.append(f"{symbol} {k}\n")
    return "".join(lines)


def bpe_vocab(units: Units) -> str:
    """Return lines `PIECE SCORE`, from which sherpa-onnx spells hotwords as these units, or "" if it needs none.

    It puts a ▁ in front of each word. Units without spaces spell no ▁, and need only tokens.txt.
    """
    if units.kind == "characters" and space_unit(units) is None:
        return ""
    return "".join(f"{piece} {units.score(k):.6g}\n" for k, piece in enumerate(units.pieces) if k > UNKNOWN)


def _tidy(proto: Any, graph: Graph) -> None:
    """Name the free axes as the graph does, and remove the exporter's paths and stack traces."""
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    names = {}
    for value in proto.graph.input:
        for axis, name in graph.axes[value.name].items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), dim.dim_param)
    for owner in (proto.graph, *proto.functions):
        for part in (owner, *owner.node, *owner.value_info):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns of packages that are not installed and of its own deprecated parts."""
    loggers = [logging.getLogger("torch.onnx"), logging.getLogger()]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnxscript|onnx_ir)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
