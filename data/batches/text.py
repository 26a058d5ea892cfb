"""Batches of text without audio, which a prediction network learns as a language model.

Guarantees: a batch depends on its plan alone, and no text is left out without being counted and named.
Try: `stillhouse train CONFIG --set text.split=text`.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import CorpusError, first_few
from ..manifest import Corpus, Utterance
from ..units import UNKNOWN, Units
from .loader import Batch, padded_units
from .sampler import BatchPlan


class TextLoader:
    """Make a `Batch` of each `BatchPlan` over the utterances that have no audio.

    Empty texts, texts with symbols that the units lack, and those of more than `max_units` units are left out.
    `left_out` has their ids by the reason.

    Arguments:
        corpus: the corpus, or some splits of it.
        rows: the ids that have features. They are speech, also if the corpus does not say where their audio is.
        targets: the `TargetReader` of each transfer that learns from text alone, by name.

    Raises:
        CorpusError: no text is left.
    """

    def __init__(
        self,
        corpus: Corpus,
        rows: Sequence[str],
        units: Units,
        *,
        max_units: int,
        targets: Mapping[str, Any] | None = None,
    ) -> None:
        self.targets = targets or {}
        self.units = units
        self.utterances: list[Utterance] = []
        lengths = array("q")
        spoken, lacking, long = "with audio", "with symbols that the units lack", f"longer than {max_units} units"
        self.left_out: dict[str, list[str]] = {spoken: [], "empty": [], lacking: [], long: []}
        have_rows = set(rows)
        for u in corpus.utterances:
            if u.audio is not None or u.id in have_rows:
                self.left_out[spoken].append(u.id)
                continue
            ids = units.ids(u.text)
            wrong = {"empty": not len(ids), lacking: (ids == UNKNOWN).any(), long: len(ids) > max_units}
            if reason := next((reason for reason, applies in wrong.items() if applies), None):
                self.left_out[reason].append(u.id)
                continue
            self.utterances.append(u)
            lengths.append(len(ids))
        if not self.utterances:
            of = f" of split {corpus.split}" if corpus.split is not None else ""
            remedies = {
                lacking: "make units of these texts, too, or choose a --transform, with `stillhouse corpus tokenizer`",
                long: "raise text.max_units, or import one sentence a line",
            }
            most = max(self.left_out, key=lambda reason: len(self.left_out[reason]))
            raise CorpusError(
                f"none of the {len(corpus)} utterances{of} is a text without audio to train on ({self.without})",
                where=corpus.path,
                expected="text.split to name a split of texts without audio",
                remedy=remedies.get(most, f"add texts with `stillhouse corpus import text TEXTS {corpus.path} --add`"),
            )
        self.lengths = np.frombuffer(lengths, np.int64)

    @property
    def without(self) -> str:
        """The texts that are left out, in words."""
        found = [f"{len(ids)} {why}: {first_few(ids, 3)}" for why, ids in self.left_out.items() if ids]
        return f"left out: {'; '.join(found) or 'none'}"

    def load(self, plan: BatchPlan) -> Batch:
        """Read the batch of a plan. It has no frames."""
        begun = time.perf_counter()
        utterances = [self.utterances[i] for i in plan.indices.tolist()]
        # The units of millions of texts are gigabytes, so those of a batch are computed again.
        ids, texts = [u.id for u in utterances], [u.text for u in utterances]
        encoded = [self.units.encode(text) for text in texts] if self.targets else []
        targets, target_lengths = padded_units([e.ids for e in encoded] or [self.units.ids(text) for text in texts])
        spans = [e.spans for e in encoded]
        read = time.perf_counter()
        transfer = {k: reader.read(ids, texts, spans, step=plan.number) for k, reader in self.targets.items()}
        return Batch(
            ids,
            torch.zeros(len(ids), 0, 0),
            torch.zeros(len(ids), dtype=torch.int64),
            targets,
            target_lengths,
            transfer,
            read - begun,
            time.perf_counter() - read,
            plan.share,
            plan.part,
        )
