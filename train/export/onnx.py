"""Graphs as ONNX files, the tokens.txt that sherpa-onnx reads, and 8-bit copies.

Invariant: a file that is written was run by onnxruntime on random inputs of other sizes than it was traced with, and
said what torch says to 1e-4. Exercised by `stillhouse export RUN --format onnx`.
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
from .graphs import Graph
from .torch import TOLERANCE, difference, traced


def need_onnx() -> None:
    """Raises UsageError that names the extra where a package is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise UsageError(
            f"--format onnx needs a package that is not here ({e})", remedy="pip install 'stillhouse[onnx]'"
        ) from None


def write_onnx(graph: Graph, path: Path) -> float:
    """Write the graph; returns how far onnxruntime's outputs are from torch's at most."""
    import onnx

    with _quiet():
        program = torch.onnx.export(
            traced(graph),
            (),
            dynamo=True,
            input_names=list(graph.axes),
            output_names=list(graph.outputs),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _tidy(proto, graph)
    onnx.helper.set_model_props(proto, graph.metadata)
    onnx.save(proto, str(path))
    found = difference(graph, lambda inputs: run_onnx(path, inputs))
    if not found <= TOLERANCE:
        raise ExportError(f"onnxruntime differs from torch by {found:.1e}", where=path, expected=f"{TOLERANCE:.0e}")
    return found


def run_onnx(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """One run on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def write_int8(source: Path, path: Path) -> None:
    """A copy whose matrix products and embeddings have 8-bit weights; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(source), str(path), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"]
        )


def tokens_txt(units: Units) -> str:
    """`SYMBOL ID` a line. sherpa-onnx turns a leading ▁ into a space, for sentencepiece and for characters alike.

    The unknown unit is spelled as `stillhouse decode` spells it: sherpa-onnx takes one that is named <unk> for a
    second blank. Raises ExportError for a unit that the format cannot say.
    """
    lines = []
    for k, piece in enumerate(units.pieces):
        symbol = {BLANK: "<blk>", UNKNOWN: UNKNOWN_TEXT}.get(k, piece)
        if not symbol or re.search(r"[ \t\n\v\f\r\0]", symbol):
            raise ExportError(f"unit {k} is {symbol!r}", expected="no white space in a unit: tokens.txt is split at it")
        lines.append(f"{symbol} {k}\n")
    return "".join(lines)


def _tidy(proto: Any, graph: Graph) -> None:
    """Free axes get the graph's names, and what tells where the exporter ran (paths, stack traces) goes."""
    names = {}
    for value in proto.graph.input:
        for axis, name in graph.axes[value.name].items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), dim.dim_param)
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.functions):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for function in proto.functions:
        for part in (*function.node, *function.value_info):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages that it would register operators for, and of its own parts' deprecation."""
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
