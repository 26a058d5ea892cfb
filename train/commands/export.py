"""The command `stillhouse export`. Run `stillhouse export --help`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ...data.commands.paths import PATH


@click.command()
@click.argument("run", type=PATH)
@click.option("--format", "kind", type=click.Choice(["onnx", "torch", "safetensors"]), required=True,
              help="Format to write.")  # fmt: skip
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--checkpoint", default="best", show_default=True,
              help="Weights to export: best, last, a step, raw or average:N.")  # fmt: skip
@click.option("--symbols-per-frame", "symbols", type=click.IntRange(1, 64),
              help="Largest number of units that sherpa-onnx may find in one encoder state. "
                   "[default: as in `decode`]")  # fmt: skip
@click.option("--streaming", is_flag=True,
              help="Export an encoder that is fed chunk by chunk. The model must be trained for it.")  # fmt: skip
@click.option("--chunk-frames", type=click.IntRange(min=1),
              help="Number of frames of 10 ms in a chunk. [default: the model's]")  # fmt: skip
@click.option("--left-chunks", type=click.IntRange(min=0),
              help="Number of earlier chunks that the encoder sees. [default: the model's]")  # fmt: skip
@click.option("--frontend", is_flag=True,
              help="Also write the speech encoder that computes the model's features, up to its layer.")  # fmt: skip
@click.option("--encoder", "source", metavar="MODEL",
              help="With --frontend: where the speech encoder is now, if it was moved.")  # fmt: skip
@click.option("--quantise", type=click.Choice(["int8"]), help="Also write ONNX files with 8-bit weights.")
@click.option("--force", is_flag=True, help="Replace an earlier export in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def export(
    run: Path,
    kind: Any,
    out: Path,
    checkpoint: str,
    quantise: str | None,
    frontend: bool,
    source: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a trained RUN for other programs: ONNX for sherpa-onnx and onnxruntime, torch.export, or safetensors.

    The exported model takes plain log mel energies, because it includes the normalisation. Commands that read a RUN
    also read a folder of safetensors, for example `stillhouse decode FOLDER`. A model over a speech encoder takes the
    encoder's states. With --frontend, the encoder is a graph of its own.

    Example: stillhouse export runs/kathleen --format onnx --out kathleen-onnx
    """
    from dataclasses import asdict

    from ..export.export import export_run

    front = _front(run, kind, source) if frontend or source is not None else None
    exported = export_run(run, out, kind, which=checkpoint, int8=quantise is not None, frontend=front, **settings)
    click.echo(json.dumps(asdict(exported), ensure_ascii=False) if as_json else exported.folder)
    click.echo(f"step {exported.step}: {', '.join(exported.files)}", err=True)
    if "joiner.beam.onnx" in exported.files:
        click.echo("sherpa-onnx: joiner.onnx is for greedy_search, joiner.beam.onnx for modified_beam_search", err=True)
    if kind == "onnx" and exported.unfit_for_sherpa:
        click.echo(f"sherpa-onnx cannot run this model: {exported.unfit_for_sherpa}", err=True)


def _front(run: Path, kind: str, source: str | None) -> Any:
    """Return the graph of the speech encoder of a run."""
    from ...data.errors import UsageError
    from ..export.front import front_metadata
    from ..export.graphs import Graph
    from .front import front_end

    if kind == "safetensors":
        raise UsageError("--frontend is for graphs", expected="--format onnx or torch")
    method = front_end(run, "cpu", source)
    if method is None:
        raise UsageError("the features of this run are fbank", where=run, expected="no --frontend")
    from ...extract.speech.graph import front_graph

    graph = front_graph(method.encoder, method.settings.layer)
    metadata = front_metadata(vars(method.settings)) | {"comment": "the input of the speech encoder goes in"}
    return Graph("frontend", graph.module, graph.inputs, graph.axes, ("features",), metadata, of_largest=True)
