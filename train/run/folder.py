"""The folder of a run: create it, check that it is a run's, and resume the run in it, on every rank.

    RUN/config.toml, identity.json, units/, checkpoints/, metrics.jsonl, dev.jsonl, …

Guarantees: rank 0 alone reads and writes the folder, so that the other ranks may be on other machines. A folder changes
only if it is empty, or holds a run with the same settings.
Try: `stillhouse train CONFIG --out RUN`, killed and started again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ...data.errors import CheckpointError, StaleError, UsageError, first_few
from ...data.files.atomic import sweep_drafts, write_atomic
from ...data.units import Units
from ..config import Config, dump_config, load_config, without_removed
from . import checkpoint, identity
from .ranks import Ranks

SETTINGS = "config.toml"
CHECKPOINTS = "checkpoints"
HYPOTHESES = "dev.jsonl"
# A new run may find these in its folder: what a run writes before its settings, and the logs that a shell redirects.
_BEFORE = {identity.FILE, identity.TEXTS, "units"}
_LOGS = {".log", ".out", ".err"}

Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class Best(_Strict):
    step: Count
    wer: float
    rnnt: float | None = None  # absent from checkpoints of earlier versions


class MeanWindow(_Strict):
    """The state of a Monitor, which is empty for a checkpoint between two windows."""

    steps: Count = 0
    sums: dict[str, float] = {}


class TextProgress(_Strict):
    """How far the texts without audio are read, and their identity."""

    epoch: Count
    position: Count
    data: dict[str, Any]


class State(_Strict):
    """What a run resumes from, besides tensors: the part of a checkpoint's state.json that decides the next steps."""

    step: Count
    epoch: Count
    position: Count
    best: Best | None
    dev_due: bool = False
    bad_steps: Count = 0
    window: MeanWindow = MeanWindow()
    averaged: Count = 0
    precision: Literal["float32", "bfloat16"]
    data: dict[str, Any]
    features: dict[str, Any] | None = None
    init: dict[str, Any] | None = None  # an Origin
    text: TextProgress | None = None  # absent without text


@dataclass(frozen=True)
class RunProgress:
    """The content of a checkpoint, on every rank."""

    where: Path
    state: State
    tensors: dict[str, dict[str, Tensor]]

    def of(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one part, such as "model". Raises CheckpointError if there are none."""
        if name not in self.tensors:
            raise CheckpointError(f"the checkpoint has no {name}", where=self.where)
        return self.tensors[name]


def resume(out: Path, config: Config, ranks: Ranks, on_progress: Callable[[str], None]) -> RunProgress | None:
    """Return what a run in `out` has done so far, or None if it has not begun.

    A damaged checkpoint is reported, and the one before it is taken. The steps between are computed again, with the
    same result.
    """
    first: RunProgress | None = None

    def read() -> tuple[Path, State, list[str]] | None:
        nonlocal first
        first = _read(out, config, on_progress)
        return None if first is None else (first.where, first.state, sorted(first.tensors))

    summary = ranks.from_first(read)
    if summary is None:
        return None
    where, state, names = summary
    return RunProgress(where, state, {n: ranks.tensors_from_first(first.tensors[n] if first else None) for n in names})


def _read(out: Path, config: Config, on_progress: Callable[[str], None]) -> RunProgress | None:
    refuse_other_folder(out)
    settings = out / SETTINGS
    if settings.exists():
        identity.refuse_other_settings(load_config(settings, saved=True), config, settings)
    usable = checkpoint.newest_whole(out / CHECKPOINTS)
    if usable is None:
        return None
    newest, tensors, damaged = usable
    try:
        if "config" in newest.state:  # Format 1 has none.
            saved = Config.model_validate(without_removed(newest.state["config"]))
            identity.refuse_other_settings(saved, config, newest.path)
        # A run without an evaluation has an empty best.
        state = State.model_validate(newest.state | {"best": newest.state.get("best") or None})
    except ValidationError as e:
        wrong = e.errors()[0]
        raise CheckpointError(
            f"the run cannot resume from this state: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}",
            where=newest.path,
            expected="a checkpoint of this version of Stillhouse",
        ) from None
    for error in damaged:
        aside = out / CHECKPOINTS / "damaged-*"
        on_progress(f"{error.where}: {error.what}. Going back to step {newest.step}, and keeping it as {aside}")
    return RunProgress(newest.path, state, tensors)


def refuse_other_folder(out: Path) -> None:
    """Raise UsageError for a folder that holds something else than a run."""
    if (out / SETTINGS).exists() or not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir():
        raise UsageError("this is not a folder", where=out, remedy="choose another --out")
    names = sorted(p.name for p in out.iterdir())
    foreign = [n for n in names if n not in _BEFORE and not n.startswith(".") and Path(n).suffix not in _LOGS]
    if foreign:
        raise UsageError(
            f"the folder has no {SETTINGS}, so it is no run's, but it has {first_few(foreign, 3)}",
            where=out,
            expected="a new or empty folder, or a run's",
            remedy="choose another --out",
        )


def create(out: Path, config: Config, units: Units, own: dict[str, Any], texts: Mapping[str, str], step: int) -> None:
    """Write the files that describe a run, which begins or resumes at `step`, and delete drafts of a killed process.

    `own` is its identity, and `texts` are the hashes of its transcripts. The caller holds the run's lock.
    """
    for folder in (out, out / "units"):
        sweep_drafts(folder)
    write_atomic(out / SETTINGS, dump_config(config))
    if not step:
        write_atomic(out / identity.FILE, json.dumps(own, indent=1) + "\n")
        write_atomic(out / identity.TEXTS, json.dumps(texts, ensure_ascii=True, indent=0) + "\n")
    units.save(out / "units")
    checkpoint.sweep(out / CHECKPOINTS, step)


def refuse_moved(out: Path, step: int) -> None:
    """Raise StaleError if another process trained the run after this one read it, at `step`."""
    paths = checkpoint.checkpoints(out / CHECKPOINTS)
    newest = checkpoint.step_of(paths[-1]) if paths else 0
    if newest != step:
        raise StaleError(
            f"another process trained this run in the meantime, from step {step} to {newest}",
            where=out,
            remedy="repeat the command to resume from there",
        )
