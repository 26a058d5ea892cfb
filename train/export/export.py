"""Export a trained model as ONNX graphs, torch programs or safetensors.

    FOLDER/model.json       format, step and settings, and the checksums of the other files
    onnx         encoder.onnx decoder.onnx joiner.onnx [joiner.beam.onnx] tokens.txt [bpe.vocab] [*.int8.onnx]
    torch        encoder.pt2 decoder.pt2 joiner.pt2 tokens.txt
                 and frontend.*, if asked for: the speech encoder that computes the features
    safetensors  model.safetensors config.toml units/
    README.md    what must feed the model, if its features are the states of a speech encoder

Guarantees: the folder is complete or not there, has no transfer head, and replaces only an earlier export.
Try: `stillhouse export RUN --format onnx --out FOLDER`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ...data.errors import UsageError
from ...data.files.atomic import named, sha256_plain, usual_mode
from ...data.files.outputs import refuse_input
from ...data.units import Units
from ..config import Config, dump_config
from ..decode.greedy import MAX_SYMBOLS
from ..decode.lm.tuned import FILE as TUNED
from ..model.transducer import Transducer
from ..run.load import EXPORT_FORMAT, EXPORT_HEAD, EXPORT_VERSION, ExportKind, load_run, trained_on
from .folder import new_folder
from .front import front_metadata, front_readme
from .graphs import Graph, offline_graph, search_graphs, unfit_for_sherpa
from .streaming import stream_graph


@dataclass(frozen=True)
class ExportedModel:
    """What was written.

    units: number of units.
    difference: largest difference of the graphs' outputs from the model's.
    symbols_per_frame: copies of each encoder state in encoder.onnx.
    unfit_for_sherpa: why sherpa-onnx cannot run the model. None if it can.
    """

    kind: ExportKind
    folder: str
    step: int
    files: list[str]
    rate_hz: int | None
    bins: int
    subsampling: int
    units: int
    streaming: bool
    difference: float
    symbols_per_frame: int
    unfit_for_sherpa: str | None


def export_run(
    run: Path,
    out: Path,
    kind: ExportKind,
    *,
    which: str = "best",
    symbols: int | None = None,
    streaming: bool = False,
    chunk_frames: int | None = None,
    left_chunks: int | None = None,
    int8: bool = False,
    force: bool = False,
    frontend: Graph | None = None,
) -> ExportedModel:
    """Export the checkpoint `which` (see `load_run`) of a run, or a folder exported as safetensors, to `out`.

    `symbols` is the largest number of units that sherpa-onnx may find in one encoder state. None: as in `decode`.
    With `streaming`, the encoder is fed chunk by chunk, by chunk_frames and left_chunks if given, else the model's own.
    int8 adds ONNX files with 8-bit weights. `frontend` is the speech encoder that is written beside. `force` replaces
    an earlier export. Raises ConfigError if the model cannot stream, ExportError if a graph cannot be written or its
    outputs differ from the model's, and UsageError if the format does not support an option or `out` may not be
    replaced.
    """
    refuse_input(out, [run])
    if kind == "onnx":
        from .onnx import need_onnx

        need_onnx()
    elif int8:
        raise UsageError(f"--quantise is for ONNX, not for {kind}", expected="--format onnx")
    if (chunk_frames or left_chunks) is not None and not streaming:
        raise UsageError("--chunk-frames and --left-chunks need --streaming")
    if streaming and kind == "safetensors":
        raise UsageError("--streaming is for ONNX and torch, because weights keep the settings of their run")
    model, units, config, step = load_run(run, which)
    trained = trained_on(run)
    front = trained.encoder
    if streaming and front is not None:
        what = f"the features are states of {front['encoder']}, which needs whole audio, so the model cannot stream"
        raise UsageError(what, where=run, expected="no --streaming")
    sherpa = unfit_for_sherpa(model) if kind == "onnx" else "it reads ONNX only"
    if front is not None and sherpa is None:
        sherpa = f"its features are states of {front['encoder']}, and sherpa-onnx computes fbank"
    if symbols is not None and sherpa:
        raise UsageError(f"--symbols-per-frame is for sherpa-onnx, which cannot run this: {sherpa}", where=run)
    if symbols is not None and symbols > 1 and model.one_unit:
        what = f"--symbols-per-frame {symbols} is for models of several units in a state, and this one has one at most"
        raise UsageError(what, where=run, expected="--symbols-per-frame 1")
    symbols = (symbols or MAX_SYMBOLS) if sherpa is None and not model.one_unit else 1
    with named(out), new_folder(out, force) as draft:
        difference = 0.0
        if kind == "safetensors":
            _write_weights(model, units, config, draft)
        else:
            encoder = (
                stream_graph(model, symbols=symbols, chunk_frames=chunk_frames, left_chunks=left_chunks)
                if streaming
                else offline_graph(model, symbols=symbols)
            )
            if front is not None:
                encoder.metadata.pop("model_type", None)
                encoder.metadata.update(front_metadata(front))
            graphs = [encoder, *search_graphs(model, symbols=symbols), *([] if frontend is None else [frontend])]
            difference = _write_graphs(graphs, units, draft, kind, int8)
        if front is not None:
            inputs = None if frontend is None else list(frontend.axes)
            (draft / "README.md").write_text(front_readme(front, inputs), encoding="utf-8")
        files = sorted(str(p.relative_to(draft)) for p in draft.rglob("*") if p.is_file())
        exported = ExportedModel(
            kind=kind,
            folder=str(out),
            step=step,
            files=files,
            rate_hz=trained.rate_hz,
            bins=len(model.encoder.feature_mean),
            subsampling=model.encoder.subsampling,
            units=units.size,
            streaming=streaming,
            difference=difference,
            symbols_per_frame=symbols,
            unfit_for_sherpa=sherpa,
        )
        head: dict[str, Any] = {"format": EXPORT_FORMAT, "version": EXPORT_VERSION, **asdict(exported)}
        head["features"] = trained.settings
        head["files"] = {name: sha256_plain(draft / name) for name in files}
        del head["folder"]
        (draft / EXPORT_HEAD).write_text(json.dumps(head, indent=1) + "\n")
        if kind == "safetensors" and (run / TUNED).is_file():
            # It is no part of the model, so that `decode --tune` may change it there.
            shutil.copyfile(run / TUNED, draft / TUNED)
    return exported


def _write_graphs(graphs: list[Graph], units: Units, draft: Path, kind: ExportKind, int8: bool) -> float:
    """Write the graphs and tokens.txt, and return the largest difference from the model's outputs."""
    from .onnx import bpe_vocab, tokens_txt, write_int8, write_onnx
    from .torch import write_torch

    (draft / "tokens.txt").write_text(tokens_txt(units), encoding="utf-8")
    if kind == "onnx" and (vocabulary := bpe_vocab(units)):
        (draft / "bpe.vocab").write_text(vocabulary, encoding="utf-8")
    worst = 0.0
    for graph in graphs:
        graph.module.eval()
        if kind == "torch":
            worst = max(worst, write_torch(graph, draft / f"{graph.name}.pt2"))
            continue
        path = draft / f"{graph.name}.onnx"
        worst = max(worst, write_onnx(graph, path))
        if int8:
            write_int8(path, draft / f"{graph.name}.int8.onnx")
    return worst


def _write_weights(model: Transducer, units: Units, config: Config, draft: Path) -> None:
    """Write the weights without the simple joint, which only training needs, and the config with all its settings."""
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if not k.startswith("simple.")}
    with usual_mode(draft / "model.safetensors"):
        save_file(weights, draft / "model.safetensors")
    (draft / "config.toml").write_text(dump_config(config), encoding="utf-8")
    units.save(draft / "units")
