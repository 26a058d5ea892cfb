"""Graphs as torch ExportedPrograms, for a program that has torch and nothing of Stillhouse.

Invariant: the program takes batches and lengths of any size from `subsampling + 1` frames, and what it says is what
the module says, bit by bit. Exercised by `stillhouse export RUN --format torch`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ...data.errors import ExportError
from .graphs import Graph

TOLERANCE = 1e-4


def traced(graph: Graph) -> ExportedProgram:
    """The graph with its free axes."""
    with seeded(0), torch.no_grad():
        inputs = graph.inputs(3)
    axes = {name: dict.fromkeys(free, Dim.DYNAMIC) for name, free in graph.axes.items()}
    with torch.no_grad(), warnings.catch_warnings():
        # nn.LSTM keeps its parameters in a list too, and the tracer finds it changed
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights", category=UserWarning)
        return torch.export.export(graph.module, tuple(inputs.values()), dynamic_shapes=tuple(axes.values()))


def write_torch(graph: Graph, path: Path) -> float:
    """Write the graph; returns how far the outputs of what was written are from the module's at most."""
    torch.export.save(traced(graph), path)
    module = torch.export.load(path).module()

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        found = module(*inputs.values())
        return [found] if isinstance(found, Tensor) else list(found)

    found = difference(graph, run)
    if not found <= TOLERANCE:
        raise ExportError(f"the program differs from the model by {found:.1e}", where=path, expected=f"{TOLERANCE:.0e}")
    return found


@torch.no_grad()
def difference(graph: Graph, run: Callable[[dict[str, Tensor]], list[Tensor]]) -> float:
    """The largest difference of `run`'s outputs from the graph's, over batches of several sizes.

    Absolute, and relative where an output is larger than 1. Infinite where shapes differ.
    """
    worst = 0.0
    with seeded(1):
        for n in (1, 2, 5):
            inputs = graph.inputs(n)
            outputs = graph.module(*inputs.values())
            expected = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            for mine, theirs in zip(expected, run(inputs), strict=True):
                if mine.shape != theirs.shape:
                    return float("inf")
                gap = (mine.double() - theirs.double()).abs() / mine.double().abs().clamp(min=1)
                worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
