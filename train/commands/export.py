"""The command `stillhouse export`. Run `stillhouse export --help`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("run", type=PATH)
@click.option(
    "--format", "kind", type=click.Choice(["onnx", "torch", "safetensors"]), required=True, help="What to write."
)
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--checkpoint", default="best", show_default=True, help="best, last, a step, raw or average:N.")
@click.option(
    "--symbols-per-frame",
    "symbols",
    type=click.IntRange(1, 64),
    help="Units that sherpa-onnx may find in one encoder state. [default: as many as `decode` may]",
)
@click.option("--streaming", is_flag=True, help="An encoder that is fed chunk by chunk, for a model trained so.")
@click.option("--chunk-frames", type=click.IntRange(min=1), help="Frames of 10 ms in a chunk. [default: the model's]")
@click.option("--left-chunks", type=click.IntRange(min=0), help="Chunks looked back to. [default: the model's]")
@click.option("--quantise", type=click.Choice(["int8"]), help="ONNX files with 8-bit weights too.")
@click.option("--force", is_flag=True, help="Replace FOLDER, which an export wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(
    run: Path,
    kind: Any,
    out: Path,
    checkpoint: str,
    quantise: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Write a trained RUN for other programs: ONNX for sherpa-onnx and onnxruntime, torch.export, or safetensors.

    Plain log mel energies go in: the normalisation is inside. A folder of safetensors is read wherever a RUN is, as
    in `stillhouse decode FOLDER`.

    Example: stillhouse export runs/kathleen --format onnx --out kathleen-onnx
    """
    from dataclasses import asdict

    from ..export.export import export_run

    found = export_run(run, out, kind, which=checkpoint, int8=quantise is not None, **settings)
    click.echo(json.dumps(asdict(found), ensure_ascii=False) if as_json else found.folder)
    click.echo(f"step {found.step}: {', '.join(found.files)}", err=True)
    if kind == "onnx" and found.unfit_for_sherpa:
        click.echo(f"sherpa-onnx cannot run this: {found.unfit_for_sherpa}", err=True)
