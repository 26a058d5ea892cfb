"""A study: arms x seeds of one recipe, each an ordinary run, defined in one TOML file.

Guarantees: all arms share what an arm does not set itself: data, budget, seed and first weights. A study whose arms
cannot be compared is refused before anything runs, as far as the settings show it.
Try: `stillhouse study STUDY`.

    base = "demo.toml"                    # a recipe, relative to this file, or none if [settings] has all
    seeds = [1, 2, 3]
    test = ["test-new"]                   # splits to decode and score, the deciding one first
    [settings]                            # replaces settings of the recipe, for all arms
    transfer.stores = ["minilm.zarr", "smollm.zarr"]
    [arms.none]
    [arms.single]                         # replaces settings of all arms
    transfer.views = "minilm/alone/6"
    [arms.tuned]
    init.source = "runs/first/single/seed-{seed}"
    [choice]                              # for --choose, which decodes no test set
    seeds = [11]
    [choice.arms.single.light]            # alternatives of the arm single, out of which one is chosen on dev
    transfer.weight = 0.1
    [choice.arms.single.heavy]
    transfer.weight = 0.3
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...data.errors import ConfigError, UsageError
from ..config import Config, ConfigSection, flatten, merged, read_toml, validated
from .choice import ChoiceSection, alternatives, chosen
from .fusion import WITH_LM, FusionSection, hypotheses

CHOICE = "choice"  # the folder of the runs that a choice is made by
USUAL = ("none", "single")  # Arms are compared with these, if the study has them.
SEED = "{seed}"  # in init.source, so that each run starts from the run of its own seed
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
# These decide the data, its order, the budget or the first weights. The runs' identities show the rest.
_SHARED = ("data", "model", "optim.steps", "loss.kind", "run.precision")


class Definition(ConfigSection):
    """The content of STUDY.toml."""

    base: Path | None = Field(None, description="Recipe, relative to the study's folder.")
    settings: dict[str, Any] = Field({}, description="Settings that replace those of the recipe, for every arm.")
    arms: dict[str, dict[str, Any]] = Field(min_length=1, description="What each arm changes. It may be nothing.")
    seeds: list[int] = Field([1, 2, 3], min_length=1)
    test: list[str] = Field(min_length=1, description="Splits to decode and score. The first one decides.")
    checkpoint: Literal["last", "best"] = Field("last", description="Weights of each run. best: by data.dev.")
    metric: Literal["wer", "cer"] = Field("wer", description="Error rate to compare.")
    against: list[str] | None = Field(
        None, description="Arms to compare with. By default `none` and `single`, or else the first."
    )
    words: dict[str, Path] = Field(
        {}, description="Classes of words with tables of their own: files of words, relative to the study's folder."
    )
    unseen: bool = Field(False, description="Show the words that no transcript of training has as a class of its own.")
    fusion: FusionSection | None = Field(None, description="Decode every test split with an n-gram model, too.")
    choice: ChoiceSection | None = Field(None, description="Alternatives of arms, to choose from on held-out speech.")


@dataclass(frozen=True)
class StudyRun:
    """One arm with one seed."""

    arm: str
    seed: int
    config: Config
    folder: Path

    def __str__(self) -> str:
        return f"{self.arm}/{self.seed}"

    def hypotheses(self, column: str) -> Path:
        """Return the file of a column of `Study.columns`."""
        return hypotheses(self.folder, column)


@dataclass(frozen=True)
class Study:
    """A study and its runs in the order of training: the reference arm first, then seed by seed."""

    name: str
    path: Path
    out: Path
    definition: Definition
    runs: tuple[StudyRun, ...]
    choosing: ChoiceSection | None = None

    def command(self, arm: str) -> str:
        """Return the command that runs an arm."""
        out, option = (self.out.parent, " --choose") if self.choosing else (self.out, "")
        return f"stillhouse study {self.path}{option} --only {arm} --out {out}"

    @property
    def columns(self) -> list[str]:
        """What each run is decoded to: every test split, and with fusion each a second time."""
        fused = [split + WITH_LM for split in self.definition.test] if self.definition.fusion else []
        return [*self.definition.test, *fused]

    @property
    def against(self) -> list[str]:
        return _against(self.definition)

    def of(self, arm: str) -> list[StudyRun]:
        """Return the runs of an arm, by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)


def load_study(path: Path, out: Path, *, choosing: bool = False) -> Study:
    """Read STUDY.toml, for runs in the folder `out`.

    With `choosing`, the arms are the alternatives of [choice], and their runs are in OUT/choice. Otherwise each arm
    with alternatives gets those settings that were chosen.

    Raises:
        ConfigError: names the file, the arm and the setting.
        UsageError: there is nothing to choose, or nothing was chosen yet.
    """
    definition = validated(Definition, [(path, read_toml(path))])
    _check_choice(definition, path)
    choice = definition.choice
    if choosing:
        if choice is None:
            raise UsageError("the study has nothing to choose", where=path, expected="a section [choice]")
        changed = {"arms": alternatives(choice, definition.arms), "seeds": choice.seeds, "test": [choice.split]}
        definition = definition.model_copy(update=changed | {"against": None, "choice": None, "fusion": None})
        out = out / CHOICE
    elif choice is not None:
        settled = {arm: merged(definition.arms[arm], changes) for arm, changes in chosen(choice, out).items()}
        definition = definition.model_copy(update={"arms": definition.arms | settled})
    for arm in definition.arms:
        if not _NAME.fullmatch(arm):
            raise ConfigError(f"{arm!r} cannot be the name of an arm", where=path, expected="letters, digits, . _ + -")
    arms = list(definition.arms)
    folders = [arm.casefold() for arm in arms]
    if len(set(folders)) < len(folders):
        twice = ", ".join(arm for arm, folder in zip(arms, folders, strict=True) if folders.count(folder) > 1)
        what = f"arms {twice} differ in case alone, and share a folder where case does not count"
        raise ConfigError(what, where=path, remedy="rename one of them")
    if len(set(definition.seeds)) < len(definition.seeds):
        raise ConfigError("a seed is named twice", where=path)
    if unknown := set(definition.against or []) - definition.arms.keys():
        raise ConfigError(f"against names {', '.join(sorted(unknown))}", where=path, expected="arms of the study")
    base = [path.parent / definition.base] if definition.base else []
    shared = [*((recipe, read_toml(recipe)) for recipe in base), (path, definition.settings)]
    runs = []
    for seed, (arm, changes) in product(definition.seeds, definition.arms.items()):
        config = validated(Config, [*shared, (f"{path}, arm {arm}", changes), (path, {"run": {"seed": seed}})])
        if config.init.source is not None:
            config.init.source = Path(str(config.init.source).replace(SEED, str(seed)))
        runs.append(StudyRun(arm, seed, config, out / arm / f"seed-{seed}"))
    runs.sort(key=lambda run: run.arm != _against(definition)[0])
    for run in runs:
        _check_comparable(runs[0], run, path)
    return Study(path.stem, path, out, definition, tuple(runs), choice if choosing else None)


def choose_runs(study: Study, arms: str | None, seeds: str | None) -> list[StudyRun]:
    """Return the runs of some arms and seeds, each given as names with commas between them. None means all.

    Raises UsageError if the study does not have such an arm or seed.
    """
    names, numbers = list(study.definition.arms), [str(seed) for seed in study.definition.seeds]
    chosen_arms, chosen_seeds = arms.split(",") if arms else names, seeds.split(",") if seeds else numbers
    unknown = [arm for arm in chosen_arms if arm not in names]
    unknown += [f"seed {n}" for n in chosen_seeds if n not in numbers]
    if unknown:
        expected = f"{', '.join(names)}; seeds {', '.join(numbers)}"
        raise UsageError(f"the study has no {', '.join(unknown)}", where=study.path, expected=expected)
    return [run for run in study.runs if run.arm in chosen_arms and str(run.seed) in chosen_seeds]


def changes_of_arms(study: Study) -> dict[str, str]:
    """Return what each arm changes, as one line of TOML."""
    return {
        arm: ", ".join(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in flatten(changes).items()) or "nothing"
        for arm, changes in study.definition.arms.items()
    }


def _check_choice(definition: Definition, path: Path) -> None:
    """Raise ConfigError unless all choices are made for arms of the study, with seeds and a split that do not test."""
    choice, fusion = definition.choice, definition.fusion
    if fusion is not None and fusion.dev in definition.test:
        what = f"[fusion] chooses weights on {fusion.dev}, which is a test of the study"
        raise ConfigError(what, where=path, expected="a split that test does not have")
    if choice is None:
        return
    if unknown := choice.arms.keys() - definition.arms.keys():
        raise ConfigError(f"[choice] names {', '.join(sorted(unknown))}", where=path, expected="arms of the study")
    if CHOICE in definition.arms:
        raise ConfigError(f"an arm cannot be named {CHOICE}, beside a section [choice]", where=path)
    if shared := set(choice.seeds) & set(definition.seeds):
        what = f"[choice] has the study's seeds {', '.join(map(str, sorted(shared)))}"
        raise ConfigError(what, where=path, expected="seeds of its own, or the test would favour what was chosen by it")
    if choice.split in definition.test:
        what = f"[choice] chooses on {choice.split}, which is a test of the study"
        raise ConfigError(what, where=path, expected="a split that test does not have")


def _against(definition: Definition) -> list[str]:
    usual = [arm for arm in USUAL if arm in definition.arms]
    return definition.against or usual or [next(iter(definition.arms))]


def _check_comparable(a: StudyRun, b: StudyRun, path: Path) -> None:
    left, right = (_shared_settings(run.config) for run in (a, b))
    if differ := [f"{k} is {left[k]} and {right[k]}" for k in left if left[k] != right[k]]:
        raise ConfigError(
            f"the arms {a.arm} and {b.arm} cannot be compared: {'; '.join(differ)}",
            where=path,
            remedy="move the setting to [settings], for all arms, or make another study",
        )


def _shared_settings(config: Config) -> dict[str, Any]:
    ctc = "loss.ctc_weight above 0"  # It decides whether the model has a CTC head.
    settings = config.flat() | {ctc: config.loss.ctc_weight > 0}
    return {k: v for k, v in settings.items() if k.startswith((*_SHARED, ctc)) and k != "model.dropout"}
