"""A run's folder: whose it is, and how a run that stopped is taken up again, on every rank.

    RUN/config.toml, identity.json, units/, checkpoints/, metrics.jsonl, dev.jsonl, …

Invariant: rank 0 alone reads and writes it, so that the other ranks may be anywhere; and what is in a folder is only
touched when it is a run's, with the same settings. Exercised by `stillhouse train CONFIG --out RUN`, killed and started
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ...data.errors import CheckpointError, StaleError, UsageError, first_few
from ...data.files.atomic import draft_of, sweep_drafts, write_atomic
from ...data.units import Units
from ..config import Config, dump_config, load_config, without_removed
from . import checkpoint, identity
from .ranks import Ranks

SETTINGS = "config.toml"
CHECKPOINTS = "checkpoints"
HYPOTHESES = "dev.jsonl"
# Left by a run that was killed before its settings were written; and logs, which a shell puts there beforehand
_BEFORE = {identity.FILE, "units"}
_LOGS = {".log", ".out", ".err"}


Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class Best(_Strict):
    step: Count
    wer: float


class MeanWindow(_Strict):
    """`Monitor.state`; empty where a checkpoint lies between two windows."""

    steps: Count = 0
    sums: dict[str, float] = {}


class State(_Strict):
    """What a run goes on from, besides tensors: the part of a checkpoint's state.json that decides what comes next."""

    step: Count
    epoch: Count
    position: Count
    best: Best | None
    bad_steps: Count = 0
    window: MeanWindow = MeanWindow()
    averaged: Count = 0
    precision: Literal["float32", "bfloat16"]
    data: dict[str, Any]


@dataclass(frozen=True)
class RunProgress:
    """What a checkpoint said, on every rank."""

    where: Path
    state: State
    tensors: dict[str, dict[str, Tensor]]

    def of(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part. CheckpointError: there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"the checkpoint holds no {name}", where=self.where)
        return self.tensors[name]


def resume(out: Path, config: Config, ranks: Ranks, report: Callable[[str], None]) -> RunProgress | None:
    """What a run in `out` has done so far; None where it has not begun. A damaged checkpoint is passed over, in words,
    for the one before it: the steps between are computed again, and come out the same.

    Errors: UsageError for a folder that is something else, StaleError for a run with other settings, CheckpointError
    where there are checkpoints but none can be used.
    """
    own: list[RunProgress | None] = [None]

    def read() -> tuple[Path, State, list[str]] | None:
        own[0] = _read(out, config, report)
        return None if own[0] is None else (own[0].where, own[0].state, sorted(own[0].tensors))

    told = ranks.from_first(read)
    if told is None:
        return None
    where, state, names = told
    return RunProgress(
        where, state, {n: ranks.tensors_from_first(own[0].tensors[n] if own[0] else None) for n in names}
    )


def _read(out: Path, config: Config, report: Callable[[str], None]) -> RunProgress | None:
    refuse_other_folder(out)
    settings = out / SETTINGS
    if settings.exists():
        identity.refuse_other_settings(load_config(settings, saved=True), config, settings)
    found = checkpoint.newest_whole(out / CHECKPOINTS)
    if found is None:
        return None
    newest, tensors, damaged = found
    if "config" in newest.state:  # not in those of format 1
        try:
            theirs = Config.model_validate(without_removed(newest.state["config"]))
        except ValidationError as e:
            raise CheckpointError(f"of another version of Stillhouse: {e.errors()[0]}", where=newest.path) from None
        identity.refuse_other_settings(theirs, config, newest.path)
    for error in damaged:
        report(f"{error.where}: {error.what}; going back to step {newest.step}, {out / CHECKPOINTS}/damaged-* keeps it")
    try:
        # A run without an evaluation has an empty best
        state = State.model_validate(newest.state | {"best": newest.state.get("best") or None})
    except ValidationError as e:
        wrong = e.errors()[0]
        said = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        raise CheckpointError(f"its state cannot be gone on from: {said}", where=newest.path) from None
    return RunProgress(newest.path, state, tensors)


def refuse_other_folder(out: Path) -> None:
    """Raises UsageError for a folder that holds other things than a run."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UsageError("not a folder", where=out, remedy="choose another --out")
    if (out / SETTINGS).exists():
        return
    names = sorted(p.name for p in out.iterdir())
    foreign = [n for n in names if n not in _BEFORE and not n.startswith(".") and Path(n).suffix not in _LOGS]
    if foreign:
        raise UsageError(
            f"it holds no run ({SETTINGS}), but {first_few(foreign, 3)}",
            where=out,
            expected="a new or empty folder, or a run's",
            remedy="choose another --out",
        )


def create(out: Path, config: Config, units: Units, own: dict[str, Any], step: int) -> None:
    """Write what the folder says of the run that goes on from `step`, and clear away what a killed one left.
    For who holds the run's lock.
    """
    for folder in (out, out / "units"):
        sweep_drafts(folder)
    write_atomic(out / SETTINGS, dump_config(config))
    if not step:
        identity.write(out, own)
    units.save(out / "units")
    checkpoint.sweep(out / CHECKPOINTS, step)


def keep_hypotheses(out: Path, triples: Iterable[tuple[str, str, str]]) -> None:
    """RUN/dev.jsonl: the last evaluation of (id, reference, hypothesis), as `stillhouse decode` writes it."""
    with draft_of(out / HYPOTHESES) as draft, draft.open("w", encoding="utf-8") as file:
        for id, ref, hyp in triples:
            file.write(json.dumps({"id": id, "hyp": hyp, "ref": ref}, ensure_ascii=False) + "\n")


def refuse_moved(out: Path, step: int) -> None:
    """Raises StaleError where the run has gone on since it was read, as `step`."""
    paths = checkpoint.checkpoints(out / CHECKPOINTS)
    newest = int(paths[-1].name[5:]) if paths else 0
    if newest != step:
        raise StaleError(
            f"another process trained here meanwhile, from step {step} to {newest}",
            where=out,
            remedy="the same command again goes on from there",
        )
