"""The settings of text without sound.

Guarantees: without text.split, no other setting of the section is accepted, so that none is ignored.
Try: `stillhouse train CONFIG --set text.split=text`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from .fields import ConfigSection, Natural, Positive


class TextSection(ConfigSection):
    """Text without sound, which trains the prediction network and the joint network's side of it as a language model.

    The loss is the cross-entropy of the next unit by the internal language model: the joint network without its
    encoder, over units that are not blank. A transfer with aligner = predictor learns from these texts, too.
    """

    split: str | None = Field(
        None, description="Splits whose utterances without audio are read, with commas between. Without it, none."
    )
    weight: float = Field(
        0.3, ge=0, description="Weight of a text batch beside the speech. With 0, no text is read beside it."
    )
    lines: Positive = Field(64, description="Texts in a batch, shared by all ranks.")
    batch_units: int = Field(4_000, ge=10, description="Largest text batch, in units, padding included.")
    max_units: int = Field(500, ge=1, description="Longest text, in units. Longer ones are left out.")
    pretrain_steps: Natural = Field(
        0, description="Steps of text alone, before the steps of optim.steps. They leave the encoder as it is."
    )

    @model_validator(mode="after")
    def _has_split(self) -> Self:
        if self.split is None and (given := sorted(self.model_dump(exclude_defaults=True))):
            raise ValueError(f"text.{given[0]} needs text.split, the splits of the texts without audio")
        return self


def refuse_no_steps(values: Any, validate: Callable[[Any], Any]) -> Any:
    """Return what `validate` makes of all settings. Raise ValidationError if they name no step, beside other errors.

    optim.steps may be 0 in a run of text alone, which the section of optim cannot know.
    """
    sections = values if isinstance(values, Mapping) else {}
    optim, text = (section if isinstance(section := sections.get(n), Mapping) else {} for n in ("optim", "text"))
    if optim.get("steps") != 0 or text.get("pretrain_steps"):
        return validate(values)
    no_steps = InitErrorDetails(type="greater_than", loc=("optim", "steps"), input=0, ctx={"gt": 0})
    others: list[InitErrorDetails] = []
    try:
        validate(values)
    except ValidationError as e:
        others = [
            cast(InitErrorDetails, {k: d[k] for k in ("type", "loc", "input", "ctx") if k in d}) for d in e.errors()
        ]
    raise ValidationError.from_exception_data("Config", [*others, no_steps])
