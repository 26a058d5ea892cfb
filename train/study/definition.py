"""A study: arms × seeds of one recipe, each an ordinary run, read from one TOML file.

Invariant: whatever an arm does not say itself, all arms share: data, budget, seed and first weights; a study whose arms
cannot be compared is refused before anything runs, as far as settings tell.
Exercised by: `stillhouse study STUDY`; pytest tests/train/study/test_study.py.

    base = "demo.toml"                    # a recipe, from this file's folder; or none, and all of it in [settings]
    seeds = [1, 2, 3]
    test = ["test-new"]                   # splits that are decoded and scored; the first decides
    [settings]                            # laid over the recipe, for all arms
    transfer.stores = ["minilm.zarr", "smollm.zarr"]
    [arms.none]
    [arms.single]                         # laid over that
    transfer.views = "minilm/alone/6"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...data.errors import ConfigError, UsageError
from ..config import Config, ConfigSection, read_toml, validated

USUAL = ("none", "single")  # the arms that others are compared with, where a study has them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# What decides the data, its order, the budget or the first weights; the runs' identities tell the rest.
_SHARED = ("data", "model", "optim.steps", "loss.kind", "run.precision")


class Definition(ConfigSection):
    """STUDY.toml."""

    base: Path | None = Field(None, description="recipe, from the study's folder")
    settings: dict[str, Any] = Field({}, description="laid over the recipe for every arm")
    arms: dict[str, dict[str, Any]] = Field(min_length=1, description="what each arm changes; may be nothing")
    seeds: list[int] = Field([1, 2, 3], min_length=1)
    test: list[str] = Field(min_length=1, description="splits to decode and score; the first decides")
    checkpoint: Literal["last", "best"] = Field("last", description="of each run; best: on data.dev")
    metric: Literal["wer", "cer"] = Field("wer", description="whose differences are shown")
    against: list[str] | None = Field(None, description="arms to compare with; none: `none` and `single`, or the first")


@dataclass(frozen=True)
class StudyRun:
    """One arm with one seed."""

    arm: str
    seed: int
    config: Config
    folder: Path

    def __str__(self) -> str:
        return f"{self.arm}/{self.seed}"


@dataclass(frozen=True)
class Study:
    name: str
    path: Path
    out: Path
    definition: Definition
    runs: tuple[StudyRun, ...]  # in the order in which they are to be run: the reference first, then seed by seed

    @property
    def against(self) -> list[str]:
        return _against(self.definition)

    def of(self, arm: str) -> list[StudyRun]:
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)


def load_study(path: Path, out: Path) -> Study:
    """Raises ConfigError naming the file, the arm and the setting."""
    definition = validated(Definition, [(path, read_toml(path))])
    for arm in definition.arms:
        if not _NAME.fullmatch(arm):
            raise ConfigError(f"{arm!r} cannot be the name of an arm", where=path, expected="letters, digits, . _ + -")
    if len(set(definition.seeds)) < len(definition.seeds):
        raise ConfigError("a seed is named twice", where=path)
    unknown = set(definition.against or []) - definition.arms.keys()
    if unknown:
        raise ConfigError(f"against names {', '.join(sorted(unknown))}", where=path, expected="arms of the study")
    base = [path.parent / definition.base] if definition.base else []
    shared = [*((recipe, read_toml(recipe)) for recipe in base), (path, definition.settings)]
    runs = {}
    for arm, changes in definition.arms.items():
        for seed in definition.seeds:
            config = validated(Config, [*shared, (f"{path}, arm {arm}", changes), (path, {"run": {"seed": seed}})])
            runs[arm, seed] = StudyRun(arm, seed, config, out / arm / f"seed-{seed}")
    reference = _against(definition)[0]
    for arm in definition.arms:
        _refuse_other_terms(runs[reference, definition.seeds[0]], runs[arm, definition.seeds[0]], path)
    rest = [(arm, seed) for seed in definition.seeds for arm in definition.arms if arm != reference]
    order = [(reference, seed) for seed in definition.seeds] + rest
    return Study(path.stem, path, out, definition, tuple(runs[key] for key in order))


def chosen(study: Study, arms: str | None, seeds: str | None) -> list[StudyRun]:
    """The runs of some arms and seeds, named with commas; None: all. Raises UsageError for what there is not."""
    wanted = arms.split(",") if arms else list(study.definition.arms)
    numbers = seeds.split(",") if seeds else [str(seed) for seed in study.definition.seeds]
    unknown = [arm for arm in wanted if arm not in study.definition.arms]
    unknown += [f"seed {n}" for n in numbers if n not in map(str, study.definition.seeds)]
    if unknown:
        has = f"{', '.join(study.definition.arms)}; seeds {', '.join(map(str, study.definition.seeds))}"
        raise UsageError(f"the study has no {', '.join(unknown)}", where=study.path, expected=has)
    return [run for run in study.runs if run.arm in wanted and str(run.seed) in numbers]


def _against(definition: Definition) -> list[str]:
    usual = [arm for arm in USUAL if arm in definition.arms]
    return definition.against or usual or [next(iter(definition.arms))]


def _refuse_other_terms(a: StudyRun, b: StudyRun, path: Path) -> None:
    left, right = (_terms(run.config) for run in (a, b))
    differ = [f"{k} is {left[k]} and {right[k]}" for k in left if left[k] != right[k]]
    if differ:
        raise ConfigError(
            f"the arms {a.arm} and {b.arm} cannot be compared: {'; '.join(differ)}",
            where=path,
            remedy="move it to [settings], for all arms, or make it a study of its own",
        )


def _terms(config: Config) -> dict[str, Any]:
    flat = config.flat()
    flat["loss.ctc_weight above 0"] = config.loss.ctc_weight > 0  # whether there is a CTC head
    shared = (*_SHARED, "loss.ctc_weight above 0")
    return {k: v for k, v in flat.items() if k.startswith(shared) and k != "model.dropout"}


def differing(study: Study) -> dict[str, str]:
    """What each arm changes, as one line of TOML, for people."""
    return {arm: ", ".join(_lines(changes)) or "nothing" for arm, changes in study.definition.arms.items()}


def _lines(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    import json

    found = []
    for key, value in tree.items():
        below = isinstance(value, Mapping)
        found += (
            _lines(value, f"{prefix}{key}.") if below else [f"{prefix}{key} = {json.dumps(value, ensure_ascii=False)}"]
        )
    return found
