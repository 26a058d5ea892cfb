"""The second decoding of a study's runs: beam search with an n-gram model, whose weights each run chooses on dev.

Guarantees: the hypotheses are those of `stillhouse decode RUN … --beam B --lm LM` with the weights beside the run. The
weight of the internal language model is chosen as well, so that no arm counts a text twice.
Try: `stillhouse study STUDY`, with `[fusion]` in STUDY.toml.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import Field

from ...data.files.atomic import sha256_plain
from ..config import ConfigSection

WITH_LM = " with lm"  # ends the name of a split that was decoded so
TUNED = ("lm-weight", "ilm-weight")


class FusionSection(ConfigSection):
    """The section [fusion] of STUDY.toml."""

    lm: Path = Field(description="N-gram model of words: an ARPA file, relative to the folder of the command.")
    beam: int = Field(4, ge=2, description="Number of hypotheses to keep.")
    dev: str = Field("dev", description="Split on which each run chooses lm-weight and ilm-weight.")

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the hypotheses of a run."""
        return {"lm": _digest(self.lm), "beam": self.beam, "dev": self.dev}


def hypotheses(folder: Path, column: str) -> Path:
    """Return the file of a run's hypotheses for a column of `Study.columns`."""
    split = column.removesuffix(WITH_LM)
    return folder / f"hyp-{split}{'' if column == split else '.lm'}.jsonl"


@cache
def _digest(path: Path) -> str:
    return sha256_plain(path)


def fused_search(
    section: FusionSection, folder: Path, of: dict[str, Any], model: Any, dev: Any, decoded: Callable
) -> partial:
    """Return the search of a run, with the weights beside it. They are chosen on the loader `dev` if there are none.

    `decoded` takes a loader and a search, and yields hypotheses. `of` has the run's checkpoint, step and corpus.
    """
    from ..decode.beam import Beam
    from ..decode.fusion import UNKNOWN_COST, WordFusion
    from ..decode.greedy import MAX_SYMBOLS
    from ..decode.lm.choose import choose_weights
    from ..decode.lm.tuned import read_tuned
    from ..decode.ngram import read_arpa

    fusion = WordFusion(read_arpa(section.lm), dev.units, 1.0, section.lm)
    search = partial(Beam, width=section.beam, fusion=fusion)
    own = (section.facts["lm"], "word", section.beam, MAX_SYMBOLS, section.dev, of["step"], None)
    kept = [c for c in read_tuned(folder) if _facts(c) == own]
    if not kept:
        settings: dict[str, Any] = {"beam": section.beam, "lm": section.lm, "lm_unit": "word", "hotwords": None}
        settings |= {"lm_unknown": UNKNOWN_COST, "max_symbols": MAX_SYMBOLS, "blank_penalty": 0.0}
        own_decoded, place = partial(decoded, dev), of | {"split": section.dev}
        choice, _ = choose_weights(folder, TUNED, search, model, dev, own_decoded, settings, given={}, **place)
        kept = [choice]
    fusion.weight = kept[-1].weights["lm-weight"]
    return partial(search, ilm_weight=kept[-1].weights["ilm-weight"])


def _facts(choice: Any) -> tuple:
    names = ("lm_sha256", "lm_unit", "beam", "max_symbols", "split", "step", "hotwords")
    return tuple(getattr(choice, name) for name in names)
