"""The settings of the transducer's losses, without those of transfers and text.

Guarantees: settings that would be ignored beside one another are refused.
Try: `stillhouse train CONFIG --set loss.kind=tdt`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .fields import ConfigSection, Natural, Positive, Share


class LossSection(ConfigSection):
    """The losses of the transducer, the transfer loss apart."""

    ctc_weight: float = Field(0.3, ge=0, description="Weight of CTC on the encoder. With 0 there is no CTC head.")
    inter_ctc_layers: list[Positive] = Field([], description="Inner encoder layers, from 1, that get a CTC loss too.")
    inter_ctc_weight: float = Field(0.3, ge=0, le=1, description="Share of the inner layers in the CTC loss.")
    consistency_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the difference between the CTC outputs of two copies of an utterance with unlike masks, "
        "such as 0.1. Each step then reads the batch twice. 0 reads it once.",
    )
    fastemit: float = Field(0.0, ge=0, description="Lambda of FastEmit.")
    eps: Share = Field(1e-6, description="Lattice cells with a smaller occupancy get no gradient.")
    kind: Literal["full", "pruned", "tdt"] = Field(
        "full", description="Transducer loss: RNN-T over all cells, RNN-T on a band of units, or tokens and durations."
    )
    band: int = Field(5, ge=2, description="Units in the pruned band, or more where a transcript needs them.")
    simple_weight: float = Field(0.5, gt=0, description="Weight of the simple loss that chooses the band.")
    durations: list[Natural] = Field(
        [0, 1, 2, 3, 4], description="Encoder states by which an arc may move on, for tdt. [1]: at most a unit a state."
    )
    sigma: float = Field(0.05, ge=0, description="Amount that every arc's log-probability is lowered by, for tdt.")

    @model_validator(mode="after")
    def _complete(self) -> LossSection:
        if self.inter_ctc_layers and not self.ctc_weight:
            raise ValueError(
                "loss.inter_ctc_layers needs loss.ctc_weight above 0, because its loss is a share of the CTC loss"
            )
        if self.consistency_weight and not self.ctc_weight:
            raise ValueError(
                "loss.consistency_weight needs loss.ctc_weight above 0, because it compares the outputs of the CTC head"
            )
        d = self.durations
        if d != [1] and (len(set(d)) < len(d) or not {0, 1} <= set(d)):
            rule = "must differ and include 0 and 1, or some transcripts fit no frames, or be [1]: one unit a state"
            raise ValueError(f"loss.durations = {d} {rule}")
        return self
