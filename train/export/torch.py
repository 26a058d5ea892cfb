"""Graphs as torch ExportedPrograms, which need torch and nothing of Stillhouse.

Guarantees: the program takes batches and lengths of any size from `subsampling + 1` frames. Its outputs are those of
the module, bit by bit.
Try: `stillhouse export RUN --format torch --out FOLDER`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ...data.errors import ExportError
from .graphs import Graph

TOLERANCE = 1e-4


def traced(graph: Graph) -> ExportedProgram:
    """Trace the graph with its free axes."""
    with seeded(0), torch.no_grad():
        inputs = graph.inputs(3)
    axes = {name: dict.fromkeys(free, Dim.DYNAMIC) for name, free in graph.axes.items()}
    with torch.no_grad(), warnings.catch_warnings():
        # nn.LSTM also keeps its parameters in a list, and the tracer warns that the list has changed.
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights", category=UserWarning)
        return torch.export.export(graph.module, tuple(inputs.values()), dynamic_shapes=tuple(axes.values()))


def write_torch(graph: Graph, path: Path) -> float:
    """Write the graph, and return the largest difference of the loaded program's outputs from the module's."""
    torch.export.save(traced(graph), path)
    module = torch.export.load(path).module()

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        return _as_list(module(*inputs.values()))

    return checked(graph, run, path)


@torch.no_grad()
def checked(graph: Graph, run: Callable[[dict[str, Tensor]], list[Tensor]], path: Path) -> float:
    """Return the largest difference of a written graph's outputs from the module's, over batches of several sizes.

    `run` runs the graph in the file `path`. The difference is absolute, and relative for outputs above 1, or a share of
    the largest output if the graph says so. Raises ExportError if it is above TOLERANCE, or if shapes differ.
    """
    worst = 0.0
    with seeded(1):
        for n in (1, 2, 5):
            inputs = graph.inputs(n)
            for ours, theirs in zip(_as_list(graph.module(*inputs.values())), run(inputs), strict=True):
                if ours.shape != theirs.shape:
                    gap = torch.tensor(torch.inf)
                else:
                    size = ours.double().abs()
                    gap = (ours.double() - theirs.double()).abs() / (
                        size.max() if graph.of_largest else size.clamp(min=1)
                    )
                worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    if not worst <= TOLERANCE:
        raise ExportError(f"its outputs differ from torch's by {worst:.1e}", where=path, expected=f"{TOLERANCE:.0e}")
    return worst


def _as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers on the CPU, and restore them afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
