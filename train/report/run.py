"""A run as facts and as one HTML page that needs nothing else: settings, curves, times, checkpoints, examples.

Invariant: everything on it is read from the run's folder, whether the run is done, goes on or was killed; nothing is
changed there, and what a corpus says is shown as text. Exercised by `stillhouse report RUN`.
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
from ...data.files.atomic import read_plain, write_atomic
from ..config import Config, load_config
from ..run import checkpoint, identity
from ..run.folder import CHECKPOINTS, HYPOTHESES, SETTINGS
from ..score.wer import Score, read_hypotheses, score
from .demo import TestSection, section
from .html import curve, curves, page, read_metrics, step_times

PARTS = {"transfer_backward": "transfer, backward", "teacher": "teacher, beside the others"}


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    given: bool  # other than the default


@dataclass(frozen=True)
class Kept:
    """A checkpoint: its size on disk, and "" or what is wrong with it."""

    step: int
    bytes: int
    wrong: str


@dataclass(frozen=True)
class RunFacts:
    """`times` are seconds a step by part, `share` and `realtime` means, `memory` the most bytes, all over the run's
    records; `seconds` what its training steps took; `skipped` steps without a finite loss.
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
    checkpoints: list[Kept]
    profile: dict[str, Any] | None
    dev: Score | None


@dataclass(frozen=True)
class RunPage:
    """The facts, and what only a page shows of the folder."""

    facts: RunFacts
    metrics: list[dict[str, Any]]
    examples: TestSection | None


def read_run(out: Path, examples: int = 24) -> RunPage:
    """CheckpointError where `out` is no run's folder, CorpusError where its hypotheses are not what was written."""
    if not (out / SETTINGS).exists():
        raise CheckpointError("not a run's folder", where=out, expected="what `stillhouse train --out` made")
    config = load_config(out / SETTINGS, saved=True)
    log = out / "metrics.jsonl"
    metrics = [m for m in (read_metrics(log) if log.exists() else []) if isinstance(m, dict) and "step" in m]
    steps = [m for m in metrics if m.get("kind") == "train"]
    dev = [m for m in metrics if m.get("kind") == "dev"]
    heard = read_hypotheses(out / HYPOTHESES) if (out / HYPOTHESES).exists() else []
    last = {k: v for k, v in dev[-1].items() if k != "kind"} if dev else None
    shown = section("dev", f"What the run heard at step {last['step']}." if last else "", heard, show=examples)
    before = [0, *(m["step"] for m in steps)]
    facts = RunFacts(
        name=out.resolve().name,
        step=max((m["step"] for m in metrics), default=0),
        steps=config.optim.steps,
        epoch=steps[-1]["epoch"] if steps else 0,
        parameters=_parameters(out),
        seconds=sum(m.get("seconds", 0.0) for m in steps),
        realtime=_mean(steps, "realtime"),
        times=dict(step_times(metrics)),
        share={k: _mean([m["share"] for m in steps if "share" in m], k) or 0.0 for k in _names(steps, "share")},
        memory={k: max(m.get("memory", {}).get(k, 0.0) for m in steps) for k in _names(steps, "memory")},
        best={k: v for k, v in min(dev, key=lambda m: m["wer"]).items() if k != "kind"} if dev else None,
        last=last,
        skipped=round(sum(m.get("skipped", 0.0) * (m["step"] - n) for m, n in zip(steps, before))),
        bad=sorted(p.name for p in (out / "bad").glob("*.safetensors")),
        settings=_settings(config),
        data=identity.read(out) or {},
        checkpoints=[_kept(path) for path in checkpoint.checkpoints(out / CHECKPOINTS)],
        profile=_profile(out),
        dev=score([ref for _, ref, _ in heard], [hyp for _, _, hyp in heard]) if heard else None,
    )
    return RunPage(facts, metrics, shown if heard else None)


def render(run: RunPage) -> str:
    """The page, self-contained."""
    return page("run.html.j2", r=run.facts, curves=run_curves(run.metrics), examples=run.examples, parts=PARTS)


def write_page(run: RunPage, path: Path) -> None:
    """Whole or as it was."""
    write_atomic(path, render(run))


def run_curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(caption, SVG): those of `report.curves`, and what else the run logged."""

    def lines(*keys: str, scale: float = 1.0) -> dict[str, list[tuple[float, float]]]:
        return {
            key.rpartition("weight/")[2]: [(m["step"], scale * m[key]) for m in metrics if m.get(key) is not None]
            for key in keys
        }

    weights = sorted({k for m in metrics for k in m if k.startswith("weight/")})
    shares = [{"step": m["step"]} | m["share"] for m in metrics if "share" in m]
    drawn = [
        ("Learning rate", lines("lr"), ""),
        ("Weight of the transfer (λ)", lines("lambda"), ""),
        ("Weights of the views", lines(*weights), ""),
        ("Norm of the gradient", lines("grad_norm"), ""),
        ("Audio heard in the time it lasts", lines("realtime"), "times real time"),
        (
            "Share of the time",
            {
                what: [(m["step"], 100 * m[key]) for m in shares if key in m]
                for key, what in (("data", "waiting for data"), ("transfer", "outside ASR"))
            },
            "%",
        ),
    ]
    found = [(caption, curve(points, label, name=caption)) for caption, points, label in drawn]
    return [*curves(metrics), *((caption, svg) for caption, svg in found if svg)]


def _names(records: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return sorted({name for m in records for name in m.get(key, {})})


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [m[key] for m in records if key in m]
    return sum(values) / len(values) if values else None


def _settings(config: Config) -> dict[str, list[Setting]]:
    found = {}
    for name, values in config.model_dump(mode="json").items():
        given = getattr(config, name).model_dump(exclude_defaults=True)
        found[name] = [Setting(key, _shown(value), key in given) for key, value in values.items()]
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _parameters(out: Path) -> int | None:
    """Weights of the newest checkpoint's model that can be counted, from its header alone."""
    for path in reversed(checkpoint.checkpoints(out / CHECKPOINTS)):
        try:
            with safe_open(path / "model.safetensors", "np") as file:
                return sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))
        except (OSError, SafetensorError):
            continue
    return None


def _kept(path: Path) -> Kept:
    size = sum(p.stat().st_size for p in path.iterdir())
    try:
        return Kept(checkpoint.load(path).step, size, "")
    except CheckpointError as e:
        return Kept(int(path.name.removeprefix("step-")), size, e.what)


def _profile(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads(read_plain(out / "profile" / "profile.json"))
    except (OSError, ValueError):
        return None
