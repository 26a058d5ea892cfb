"""The settings of a run that starts from another one.

Guarantees: parts have one order, however they are given, so that the same parts are the same settings.
Try: `stillhouse train CONFIG --init RUN --init-parts encoder --freeze encoder:4`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from .fields import ConfigSection

Part = Literal["encoder", "predictor", "joint"]
PARTS: tuple[Part, ...] = get_args(Part)


class InitSection(ConfigSection):
    """What a run takes from another run, or from an export as safetensors, and what of it never changes.

    A weight is taken if it has the same place, shape and meaning there. Rows of units are taken by the unit's text.
    """

    source: Path | None = Field(None, description="Folder of the run or export. Without it, weights are random.")
    checkpoint: str = Field(
        "best", description="Weights of a run: best, last, a step, raw, or average:N, as in `decode`."
    )
    parts: list[Part] = Field(
        [*PARTS],
        min_length=1,
        description="Parts to take, or all. The CTC head goes with the joint network.",
    )
    freeze: list[str] = Field(
        [],
        description="Parts whose taken weights are not trained: encoder, encoder:N (its front and first N blocks), "
        "predictor, joint; or none.",
    )
    lr_factor: float = Field(1.0, gt=0, description="Learning rate of what was taken, as a multiple of optim.lr.")

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _step(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("parts", "freeze", mode="before")
    @classmethod
    def _with_commas(cls, value: Any, info: ValidationInfo) -> Any:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        if info.field_name == "parts" and names == ["all"]:
            return [*PARTS]
        return [] if info.field_name == "freeze" and names == ["none"] else names

    @field_validator("parts", "freeze")
    @classmethod
    def _in_order(cls, names: list[str]) -> list[str]:
        """Return each name once, in one order, because two orders mean the same."""
        return sorted(
            dict.fromkeys(names), key=lambda name: (not name.startswith("encoder"), name != "predictor", name)
        )

    @model_validator(mode="after")
    def _parts_exist(self) -> Self:
        for name in self.freeze:
            if not re.fullmatch(r"encoder(:[0-9]+)?|predictor|joint", name):
                raise ValueError(f"init.freeze has {name!r}; expected encoder, encoder:N, predictor or joint")
            if name.partition(":")[0] not in self.parts:
                raise ValueError(f"init.freeze has {name}, which init.parts = {', '.join(self.parts)} does not take")
        return self
