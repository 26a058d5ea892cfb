"""The weights that `decode --tune` chose, in RUN/tuned.json, for the language model that they were chosen with.

Guarantees: weights are returned only for a file of the same bytes whose n-grams are of the same kind. A point that was
measured before a kill is not measured again.
Try: `stillhouse decode RUN CORPUS FEATURES --beam 8 --lm words.arpa`, after `--tune`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ....data.errors import CheckpointError, UsageError
from ....data.files.atomic import read_plain, sha256_plain, write_atomic

FILE, FORMAT, VERSION = "tuned.json", "stillhouse-tuned", 1


class _TunedRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TunedPoint(_TunedRecord):
    """The error rates of one point of the grid."""

    weights: dict[str, float]
    wer: float
    cer: float


class Tuned(_TunedRecord):
    """Weights, the language model and the search that they were chosen with, and on what."""

    lm: str
    lm_sha256: str
    lm_unit: str
    beam: int
    max_symbols: int
    weights: dict[str, float] = Field(min_length=1)
    wer: float
    cer: float
    checkpoint: str
    step: int
    corpus: str
    split: str | None
    hotwords: str | None = None  # earlier versions do not have it
    utterances: int
    points: list[TunedPoint]

    @property
    def words(self) -> str:
        """The weights as options of `decode`."""
        return " ".join(f"--{name} {value:g}" for name, value in self.weights.items())


class Unfinished:
    """The points that a `--tune` has measured until now, in RUN/tuning-KEY.jsonl. `end` deletes the file.

    KEY is a hash of `facts`, which are all that decides the error rates of a point. Points of other facts are not seen.
    """

    def __init__(self, run: Path, facts: Any) -> None:
        key = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = run / f"tuning-{key}.jsonl"
        self.points: list[TunedPoint] = []
        with suppress(OSError, ValidationError):  # Then they are measured again.
            self.points = [TunedPoint.model_validate_json(line) for line in read_plain(self.path).splitlines()]

    def get(self, weights: dict[str, float]) -> tuple[float, float] | None:
        """Return WER and CER of a point, None if it was not measured."""
        return next(((p.wer, p.cer) for p in self.points if p.weights == weights), None)

    def add(self, point: TunedPoint) -> None:
        """Write one more point, which is on disk on return."""
        self.points.append(point)
        write_atomic(self.path, "".join(p.model_dump_json() + "\n" for p in self.points))

    def end(self) -> None:
        """Delete the file, after `keep_tuned` has written the points."""
        self.path.unlink(missing_ok=True)


class _File(_TunedRecord):
    format: str
    version: int
    choices: list[Tuned]


def read_tuned(run: Path) -> list[Tuned]:
    """Return the choices beside a run, the newest last. Raises CheckpointError if the file is damaged."""
    path = run / FILE
    remedy = "delete it, and repeat `stillhouse decode … --tune`"
    try:
        file = _File.model_validate_json(read_plain(path))
    except FileNotFoundError:
        return []
    except (OSError, ValidationError, RecursionError) as e:
        why = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
        raise CheckpointError(f"the tuned weights cannot be read: {why}", where=path, remedy=remedy) from None
    if (file.format, file.version) != (FORMAT, VERSION):
        what = f"{file.format} of version {file.version}"
        raise CheckpointError(what, where=path, expected=f"{FORMAT} of version {VERSION}", remedy=remedy)
    return file.choices


def tuned_for(run: Path, lm: Path, lm_unit: str) -> Tuned | None:
    """Return the weights that were chosen for a run with a language model. None if none were chosen with any.

    Raises UsageError if all choices were made with other files, or with n-grams of another kind.
    """
    choices = read_tuned(run)
    if not choices:
        return None
    digest = sha256_plain(lm)
    for choice in reversed(choices):
        if (choice.lm_sha256, choice.lm_unit) == (digest, lm_unit):
            return choice
    last = choices[-1]
    if last.lm_sha256 == digest:
        what = f"the weights beside the run were tuned with --lm-unit {last.lm_unit}"
    else:
        what = f"the weights beside the run were tuned with another language model, {last.lm}"
    what += f" ({last.words})"
    remedy = "give the weights with --lm-weight and --ilm-weight, or tune them for this model with --tune"
    raise UsageError(what, where=lm, expected="the same file, or weights of its own", remedy=remedy)


def keep_tuned(run: Path, choice: Tuned) -> Path:
    """Write a choice beside a run, in the place of an earlier one with the same model. Return the file."""
    own = (choice.lm_sha256, choice.lm_unit)
    others = [c for c in read_tuned(run) if (c.lm_sha256, c.lm_unit) != own]
    file = _File(format=FORMAT, version=VERSION, choices=[*others, choice])
    write_atomic(run / FILE, json.dumps(file.model_dump(), indent=1, ensure_ascii=False) + "\n")
    return run / FILE
