"""Greedy search: the best unit at every step, and for a token-and-duration transducer (TDT) the best duration, too.

Guarantees: the result depends neither on the rest of the batch (to float rounding) nor on how the states are cut.
Try: `stillhouse decode RUN CORPUS FEATURES`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..model.transducer import BLANK, Transducer
from .emissions import Emissions

MAX_SYMBOLS = 8  # units in one frame
FEWEST, MOST = 4, 32  # frames that are scored at once: after a unit, and after a long row of blanks


class Search(Protocol):
    """A decoder of a batch of utterances, which is fed with encoder states as they come."""

    def feed(self, states: Tensor, lengths: Tensor) -> None:
        """Search further in states [B, T, dim], of which the first lengths [B] count."""

    def best(self) -> list[list[Emissions]]:
        """Return the results of each utterance so far, best first. More states may follow."""

    def finish(self) -> list[list[Emissions]]:
        """Return the results of utterances that end here, best first."""


def unit_confidence(unit: Tensor, blank: Tensor) -> Tensor:
    """Return P(unit | not blank) from the log-probabilities of the unit and of the blank."""
    return torch.exp(unit - torch.log(-torch.expm1(blank.clamp(max=-1e-7)))).clamp(max=1.0)


class Scores(NamedTuple):
    """What the joint network gives in K frames of N utterances: lists [N][K], and of durations both ways to choose."""

    unit: list[list[int]]
    best: list[list[float]]  # log-probability of the unit
    blank: list[list[float]]
    step: list[list[tuple[int, float]]]  # the best duration, and its log-probability
    move: list[list[tuple[int, float]]]  # the same of the durations above 0


class Greedy:
    """A Search of `batch` utterances that takes the best unit, at most `max_symbols` in a frame.

    The prediction network changes after a unit only. So one product scores several frames of each utterance, of which
    those up to its next unit count. An utterance does not wait for the others.
    """

    def __init__(self, model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> None:
        self.model, self.max_symbols, self.batch = model, max_symbols, batch
        self.device = model.joint.output.weight.device
        self.state = model.predictor.initial(batch, self.device)
        self.predicted = model.joint.predictor(model.predictor.step(self.state))
        self.frames = [0] * batch
        self.score = [0.0] * batch
        self.ahead = [0] * batch  # frames into the next states
        self.in_frame = [0] * batch  # units emitted at the frame
        self.results: list[Emissions] = [Emissions() for _ in range(batch)]

    @torch.inference_mode()  # Small operations take an eighth less time than without gradients alone.
    def feed(self, states: Tensor, lengths: Tensor) -> None:
        projected = self.model.joint.encoder(states).float()
        ends = lengths.clamp(max=states.shape[1]).tolist()
        look = FEWEST
        while rows := [b for b in range(self.batch) if self.ahead[b] < ends[b]]:
            look = min(look, max(ends[b] - self.ahead[b] for b in rows))
            scores = self._scores(*self._chosen(projected, rows, look))
            new = {
                b: unit
                for n, b in enumerate(rows)
                if (unit := self._walk(scores, n, b, min(ends[b], look + self.ahead[b]))) != BLANK
            }
            look = FEWEST if new else min(2 * look, MOST)
            if new:
                self._advance(new)
        for b, end in enumerate(ends):
            self.frames[b] += end
            self.ahead[b] -= end

    def _chosen(self, projected: Tensor, rows: list[int], look: int) -> tuple[Tensor, Tensor]:
        """Return `look` frames [N, K, J] of the utterances `rows` from where they are, and what is predicted there."""
        if self.batch == 1:
            return projected[:, self.ahead[0] : self.ahead[0] + look], self.predicted[:, None]
        first = torch.tensor([self.ahead[b] for b in rows], device=self.device)
        chosen = torch.tensor(rows, device=self.device)
        frames = (first[:, None] + torch.arange(look, device=self.device)).clamp(max=projected.shape[1] - 1)
        return projected[chosen[:, None], frames], self.predicted[chosen, None]

    def _scores(self, encoded: Tensor, predicted: Tensor) -> Scores:
        logp = self.model.joint(encoded, predicted).float().log_softmax(-1)
        best, unit = logp.max(-1)
        return Scores(unit.tolist(), best.tolist(), logp[..., BLANK].tolist(), [], [])

    def _walk(self, scores: Scores, n: int, b: int, end: int) -> int:
        """Take utterance b through blanks up to its next unit, which is returned, or to the frame `end`."""
        unit, best, blank = scores.unit[n], scores.best[n], scores.blank[n]
        first = self.ahead[b]
        for k in range(end - first):
            if unit[k] != BLANK and self.in_frame[b] < self.max_symbols:
                self.score[b] += best[k]
                self.ahead[b] = first + k
                self.in_frame[b] += 1
                self._emit(b, unit[k], best[k], blank[k])
                return unit[k]
            self.score[b] += blank[k]
            self.in_frame[b] = 0
        self.ahead[b] = end
        return BLANK

    def _emit(self, b: int, unit: int, best: float, blank: float) -> None:
        result = self.results[b]
        result.units.append(unit)
        result.frames.append(self.frames[b] + self.ahead[b])
        result.confidence.append(min(1.0, math.exp(best - math.log(-math.expm1(min(blank, -1e-7))))))

    def _advance(self, new: dict[int, int]) -> None:
        """Take the prediction network on by the `new` units of utterances."""
        units = torch.tensor([new.get(b, BLANK) for b in range(self.batch)], device=self.device)
        self.state = self.model.predictor.advance(self.state, units, units != BLANK)
        self.predicted = self.model.joint.predictor(self.model.predictor.step(self.state))

    def best(self) -> list[list[Emissions]]:
        return [
            [Emissions([*r.units], [*r.frames], [*r.confidence], score)] for r, score in zip(self.results, self.score)
        ]

    finish = best


class TdtGreedy(Greedy):
    """A Search that takes the best unit and the best duration at every step.

    A blank moves on by the best duration above 0, as in the loss. So does a unit that would be one too many in its
    frame. A step beyond the states that have come is finished in the next ones.
    """

    def _scores(self, encoded: Tensor, predicted: Tensor) -> Scores:
        tokens, durations = self.model.joint.with_durations(encoded, predicted)
        logp, steps = tokens.float().log_softmax(-1), durations.float().log_softmax(-1)
        still = torch.tensor([duration == 0 for duration in self.model.durations], device=self.device)
        best, unit = logp.max(-1)
        choices = []
        for allowed in (steps, steps.masked_fill(still, -torch.inf)):
            score, choice = allowed.max(-1)
            choices.append([[*zip(*row)] for row in zip(choice.tolist(), score.tolist())])
        return Scores(unit.tolist(), best.tolist(), logp[..., BLANK].tolist(), *choices)

    def _walk(self, scores: Scores, n: int, b: int, end: int) -> int:
        first = self.ahead[b]
        while (k := self.ahead[b] - first) < end - first:
            unit, best = scores.unit[n][k], scores.best[n][k]
            must_move = unit == BLANK or self.in_frame[b] + 1 >= self.max_symbols
            choice, step = (scores.move if must_move else scores.step)[n][k]
            self.score[b] += best + step
            if unit != BLANK:
                self._emit(b, unit, best, scores.blank[n][k])
            moved = self.model.durations[choice]
            self.in_frame[b] = 0 if moved else self.in_frame[b] + 1
            self.ahead[b] += moved
            if unit != BLANK:
                return unit
        return BLANK


def greedy_search(model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> Greedy:
    """Return the greedy search that fits the model: with durations or without."""
    return (TdtGreedy if model.durations else Greedy)(model, batch, max_symbols=max_symbols)


def greedy(model: Transducer, states: Tensor, lengths: Tensor, *, max_symbols: int = MAX_SYMBOLS) -> list[list[int]]:
    """Return the units that greedy search finds in states [B, T, dim] and lengths [B] from `model.encode`."""
    search = greedy_search(model, len(states), max_symbols=max_symbols)
    search.feed(states, lengths)
    return [results[0].units for results in search.finish()]
