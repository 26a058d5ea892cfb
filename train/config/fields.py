"""What the sections of the settings share: their base, and types of numbers.

Guarantees: a section refuses settings that it does not know, and numbers that are not finite.
Try: `pytest tests/train/test_config.py`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ConfigSection(BaseModel):
    """Settings of which all are known and finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
