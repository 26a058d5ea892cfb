"""What a study chooses on held-out speech, for some of its arms, before it decodes a test set.

Guarantees: all alternatives are in the study's file before a run begins. They have seeds of their own, and no test set
is decoded for them. A choice counts only for the alternatives that it was made among.
Try: `stillhouse study STUDY --choose`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ...data.errors import ConfigError, StaleError, UsageError
from ...data.files.atomic import read_plain, write_atomic
from ..config import ConfigSection, merged

FILE = "choice.json"


class ChoiceSection(ConfigSection):
    """The section [choice] of STUDY.toml."""

    seeds: list[int] = Field(min_length=1, description="Seeds of the runs to choose by. The study has others.")
    split: str = Field("dev", description="Split to choose on.")
    metric: Literal["wer", "cer", "loss"] = Field("cer", description="What to minimise. loss: that of data.dev.")
    arms: dict[str, dict[str, dict[str, Any]]] = Field(
        min_length=1, description="Alternatives of each arm by their names: settings that replace those of the arm."
    )


class ChoiceRecord(ConfigSection):
    """What was chosen: the alternatives as they were, and the name of the best of each arm."""

    section: ChoiceSection
    best: dict[str, str]
    values: dict[str, dict[str, float]]  # the metric of every alternative


def alternatives(section: ChoiceSection, arms: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings of each alternative, as arms of a study of their own with the names ARM.ALTERNATIVE."""
    return {
        f"{arm}.{name}": merged(arms[arm], changes) for arm, of in section.arms.items() for name, changes in of.items()
    }


def make_choice(found: Mapping[str, float | None], section: ChoiceSection, folder: Path) -> ChoiceRecord:
    """Choose the alternative of each arm with the least metric, and write it to FOLDER/choice.json.

    `found` has the mean over seeds by ARM.ALTERNATIVE, and None for a loss that was not measured, which raises
    UsageError. Of equal alternatives the first is best.
    """
    values: dict[str, dict[str, float]] = {}
    for arm, of in section.arms.items():
        for name in of:
            value = found[f"{arm}.{name}"]
            if value is None:
                what = f"{arm}.{name} has no loss on held-out speech"
                raise UsageError(what, where=folder, remedy='set data.dev, or choice.metric = "cer"')
            values.setdefault(arm, {})[name] = value
    best = {arm: min(of, key=of.__getitem__) for arm, of in values.items()}
    choice = ChoiceRecord(section=section, best=best, values=values)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, json.dumps(choice.model_dump(), ensure_ascii=False, indent=1) + "\n")
    return choice


def chosen(section: ChoiceSection, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings that were chosen for each arm, from FOLDER/choice.json.

    Raises UsageError if nothing was chosen yet, and StaleError if it was chosen among other alternatives.
    """
    path, remedy = folder / FILE, "stillhouse study STUDY --choose"
    try:
        choice = ChoiceRecord.model_validate_json(read_plain(path))
    except FileNotFoundError:
        what = f"nothing has been chosen yet for {', '.join(section.arms)}"
        raise UsageError(what, where=path, expected=f"`{remedy}` first") from None
    except (OSError, ValidationError) as e:
        raise ConfigError(
            f"not a readable choice: {e}", where=path, remedy=f"delete it, and repeat `{remedy}`"
        ) from None
    if choice.section != section:
        what = "the choice was made among other alternatives than [choice] has now, or with other seeds"
        raise StaleError(what, where=path, remedy=f"repeat `{remedy}`, or restore the section")
    return {arm: section.arms[arm][name] for arm, name in choice.best.items()}


def in_lines(choice: ChoiceRecord) -> list[str]:
    """Return a line on the choice of each arm."""
    kind = "dev loss" if choice.section.metric == "loss" else choice.section.metric.upper()
    form = "{:.4f}" if choice.section.metric == "loss" else "{:.2%}"
    return [
        f"{arm}: {best}, {kind} {form.format(choice.values[arm][best])} (of "
        + ", ".join(f"{name} {form.format(value)}" for name, value in choice.values[arm].items())
        + ")"
        for arm, best in choice.best.items()
    ]
