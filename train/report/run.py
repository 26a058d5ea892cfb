"""A run as facts and as an HTML page: settings, curves, times, checkpoints, examples.

Guarantees: everything is read from the run's folder, whether the run is done, still running or was killed. Nothing is
changed there.
Try: `stillhouse report RUN`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...data.errors import CheckpointError
from ...data.files.atomic import read_plain
from ..config import Config, load_config
from ..run import checkpoint, identity
from ..run.folder import CHECKPOINTS, HYPOTHESES, SETTINGS
from ..score.hypotheses import read_hypotheses
from ..score.wer import Score, score
from .html import ExampleSection, Metrics, curves, draw, page, read_metrics, section, series, step_times

PARTS = {"transfer_backward": "transfer, backward", "teacher": "teacher, in parallel"}


@dataclass(frozen=True)
class Setting:
    """A setting of the run. It is `given` if it differs from the default."""

    name: str
    value: str
    given: bool


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint, its size on disk, and what is wrong with it, which is empty for a good one."""

    step: int
    bytes: int
    wrong: str


@dataclass(frozen=True)
class RunFacts:
    """What the page shows of a run.

    parameters: weights of the model. None without a readable checkpoint.
    seconds: time of the training steps.
    realtime: hours of audio in an hour, the mean.
    times: {part: seconds in a step}, means.
    share: {"data": waiting for data, "transfer": device time of the transfer}, means.
    memory: {"resident" or "cuda": most bytes}.
    best, last: metrics of the best and of the last evaluation.
    skipped: steps without a finite loss or gradient. `bad` names the files of their batches.
    """

    name: str
    step: int
    steps: int
    epoch: int
    parameters: int | None
    seconds: float
    realtime: float | None
    times: dict[str, float]
    share: dict[str, float]
    memory: dict[str, float]
    best: dict[str, float] | None
    last: dict[str, float] | None
    skipped: int
    bad: list[str]
    settings: dict[str, list[Setting]]
    data: dict[str, Any]
    checkpoints: list[SavedCheckpoint]
    profile: dict[str, Any] | None
    dev: Score | None


@dataclass(frozen=True)
class RunPage:
    """The facts, and what only the page shows of the folder."""

    facts: RunFacts
    metrics: list[dict[str, Any]]
    examples: ExampleSection | None


def read_run(out: Path, examples: int = 24) -> RunPage:
    """Read the folder of a run, and `examples` of its hypotheses.

    Raises CheckpointError if `out` is not the folder of a run, and CorpusError if its hypotheses are damaged.
    """
    if not (out / SETTINGS).exists():
        raise CheckpointError("this is not a run's folder", where=out, expected="what `stillhouse train --out` wrote")
    config = load_config(out / SETTINGS, saved=True)
    metrics = [m for m in read_metrics(out / "metrics.jsonl") if isinstance(m, dict) and "step" in m]
    steps = [m for m in metrics if m.get("kind") == "train"]
    dev = [m for m in metrics if m.get("kind") == "dev" and "wer" in m]  # not one of text alone
    triples = read_hypotheses(out / HYPOTHESES) if (out / HYPOTHESES).exists() else []
    last = {k: v for k, v in dev[-1].items() if k != "kind"} if dev else None
    shown = section("dev", f"The hypotheses at step {last['step']}." if last else "", triples, show=examples)
    before = [0, *(m["step"] for m in steps)]
    facts = RunFacts(
        name=out.resolve().name,
        step=max((m["step"] for m in metrics), default=0),
        steps=config.steps,
        epoch=steps[-1]["epoch"] if steps else 0,
        parameters=_parameters(out),
        seconds=sum(m.get("seconds", 0.0) for m in steps),
        realtime=_mean(steps, "realtime"),
        times=dict(step_times(metrics)),
        share={k: _mean([m["share"] for m in steps if "share" in m], k) or 0.0 for k in _names(steps, "share")},
        memory={k: max(m.get("memory", {}).get(k, 0.0) for m in steps) for k in _names(steps, "memory")},
        best={k: v for k, v in min(dev, key=_rank).items() if k != "kind"} if dev else None,
        last=last,
        skipped=round(sum(m.get("skipped", 0.0) * (m["step"] - n) for m, n in zip(steps, before))),
        bad=sorted(p.name for p in (out / "bad").glob("*.safetensors")),
        settings=_settings(config),
        data=identity.read(out) or {},
        checkpoints=[_saved(path) for path in checkpoint.checkpoints(out / CHECKPOINTS)],
        profile=_profile(out),
        dev=score([ref for _, ref, _ in triples], [hyp for _, _, hyp in triples]) if triples else None,
    )
    return RunPage(facts, metrics, shown if triples else None)


def render(run: RunPage) -> str:
    """Return the page."""
    values = {"curves": run_curves(run.metrics), "examples": run.examples, "parts": PARTS}
    return page("run.html.j2", f"Run {run.facts.name}", r=run.facts, **values)


def run_curves(metrics: Metrics) -> list[tuple[str, str]]:
    """Return (caption, SVG) of `html.curves` and of what else the run logged."""
    names = sorted({k for m in metrics for k in m})
    weights = [k for k in names if k.startswith("weight")]
    lambdas = {k: series(metrics, k) for k in names if k.startswith("lambda")}
    norms = {k: series(metrics, k) for k in names if "grad_norm" in k}
    shares = [{"step": m["step"]} | m["share"] for m in metrics if "share" in m]
    labels = {"data": "waiting for data", "transfer": "outside ASR"}
    return curves(metrics) + draw(
        [
            ("Learning rate", {"lr": series(metrics, "lr")}, ""),
            ("Weight of the transfer (λ)", lambdas, ""),
            ("Weights of the views", {k.removeprefix("weight")[1:]: series(metrics, k) for k in weights}, ""),
            ("Norm of the gradient", norms, ""),
            ("Speed", {"realtime": series(metrics, "realtime")}, "times real time"),
            ("Share of the time", {what: series(shares, k, scale=100) for k, what in labels.items()}, "%"),
        ]
    )


def _rank(record: Mapping[str, Any]) -> tuple[float, float]:
    """Order evaluations as `Trainer` does, by error rate and then by loss."""
    return record["wer"], record.get("rnnt", math.inf)


def _names(records: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return sorted({name for m in records for name in m.get(key, {})})


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [m[key] for m in records if key in m]
    return sum(values) / len(values) if values else None


def _settings(config: Config) -> dict[str, list[Setting]]:
    sections = {}
    for name, values in config.model_dump(mode="json").items():
        given = getattr(config, name).model_dump(exclude_defaults=True)
        sections[name] = [Setting(key, _shown(value), key in given) for key, value in values.items()]
    return sections


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parameters(out: Path) -> int | None:
    """Count the weights of the newest readable checkpoint, by its header alone."""
    for path in reversed(checkpoint.checkpoints(out / CHECKPOINTS)):
        try:
            with safe_open(path / "model.safetensors", "np") as file:
                return sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
        except (OSError, SafetensorError):
            continue
    return None


def _saved(path: Path) -> SavedCheckpoint:
    size = sum(p.stat().st_size for p in path.iterdir())
    try:
        return SavedCheckpoint(checkpoint.load(path).step, size, "")
    except CheckpointError as e:
        return SavedCheckpoint(int(path.name.removeprefix("step-")), size, e.what)


def _profile(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads(read_plain(out / "profile" / "profile.json"))
    except (OSError, ValueError):
        return None
