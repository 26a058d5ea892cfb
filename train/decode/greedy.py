"""Greedy search: the best unit at every step, and for a token-and-duration transducer (TDT) the best duration, too.

Guarantees: the result depends neither on the rest of the batch (to float rounding) nor on how the states are cut.
Try: `stillhouse decode RUN CORPUS FEATURES`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..model.transducer import BLANK, Transducer
from .emissions import Emissions

MAX_SYMBOLS = 8  # units in one frame


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


class Greedy:
    """A Search of `batch` utterances that takes the best unit, at most `max_symbols` in a frame."""

    def __init__(self, model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> None:
        self.model, self.max_symbols, self.batch = model, max_symbols, batch
        self.device = model.joint.output.weight.device
        self.state = model.predictor.initial(batch, self.device)
        self.predicted = model.joint.predictor(model.predictor.step(self.state))
        self.frames = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.score = torch.zeros(batch, dtype=torch.float64, device=self.device)
        self.results: list[Emissions] = [Emissions() for _ in range(batch)]

    @torch.no_grad()
    def feed(self, states: Tensor, lengths: Tensor) -> None:
        projected = self.model.joint.encoder(states).float()
        lengths = lengths.to(self.device)
        emitted: list[tuple[Tensor, ...]] = []
        for t in range(states.shape[1]):
            active = lengths > t
            for symbol in range(self.max_symbols + 1):
                logp = self.model.joint(projected[:, t], self.predicted).float().log_softmax(-1)
                unit = logp.argmax(-1) if symbol < self.max_symbols else torch.full_like(lengths, BLANK)
                best = logp.gather(1, unit[:, None])[:, 0]
                self.score += torch.where(active, best, 0.0)
                active = active & (unit != BLANK)
                if not bool(active.any()):
                    break
                emitted.append((active, unit, self.frames + t, unit_confidence(best, logp[:, BLANK])))
                self._advance(unit, active)
        self.frames += lengths.clamp(max=states.shape[1])
        self._keep(emitted)

    def _advance(self, unit: Tensor, where: Tensor) -> None:
        self.state = self.model.predictor.advance(self.state, unit, where)
        self.predicted = self.model.joint.predictor(self.model.predictor.step(self.state))

    def _keep(self, emitted: list[tuple[Tensor, ...]]) -> None:
        """Add (which utterances emit, unit, frame, confidence), each [B], to the results: one copy to the host."""
        if emitted:
            emits, units, frames, confidence = (torch.stack(column, dim=1).cpu() for column in zip(*emitted))
            for b, (result, row) in enumerate(zip(self.results, emits)):
                result.units.extend(units[b][row].tolist())
                result.frames.extend(frames[b][row].tolist())
                result.confidence.extend(confidence[b][row].tolist())

    def best(self) -> list[list[Emissions]]:
        scores = self.score.tolist()
        return [[Emissions([*r.units], [*r.frames], [*r.confidence], score)] for r, score in zip(self.results, scores)]

    finish = best


class TdtGreedy(Greedy):
    """A Search that takes the best unit and the best duration at every step.

    A blank moves on by the best duration above 0, as in the loss. So does a unit that would be one too many in its
    frame. A step beyond the states that have come is finished in the next ones.
    """

    def __init__(self, model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> None:
        super().__init__(model, batch, max_symbols=max_symbols)
        self.durations = torch.tensor(model.durations, device=self.device)
        self.ahead = torch.zeros(batch, dtype=torch.int64, device=self.device)  # frames into the next states
        self.in_frame = torch.zeros(batch, dtype=torch.int64, device=self.device)  # units emitted at the frame

    @torch.no_grad()
    def feed(self, states: Tensor, lengths: Tensor) -> None:
        rows = torch.arange(self.batch, device=self.device)
        lengths = lengths.to(self.device).clamp(max=states.shape[1])
        projected = self.model.joint.encoder(states).float()
        t = self.ahead
        emitted: list[tuple[Tensor, ...]] = []
        while bool((active := t < lengths).any()):
            frame = projected[rows, t.clamp(max=states.shape[1] - 1)]
            tokens, steps = self.model.joint.with_durations(frame, self.predicted)
            logp, steps = tokens.float().log_softmax(-1), steps.float().log_softmax(-1)
            best, unit = logp.max(-1)
            must_move = (unit == BLANK) | (self.in_frame + 1 >= self.max_symbols)
            forbidden = must_move[:, None] & (self.durations == 0)
            best_step, choice = steps.masked_fill(forbidden, float("-inf")).max(-1)
            moved = self.durations[choice]
            self.score += torch.where(active, best + best_step, 0.0)
            emits = active & (unit != BLANK)
            emitted.append((emits, unit, self.frames + t, unit_confidence(best, logp[:, BLANK])))
            self._advance(unit, emits)
            t = torch.where(active, t + moved, t)
            self.in_frame = torch.where(active, torch.where(moved > 0, 0, self.in_frame + 1), self.in_frame)
        self.ahead = t - lengths
        self.frames += lengths
        self._keep(emitted)


def greedy_search(model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> Greedy:
    """Return the greedy search that fits the model: with durations or without."""
    return (TdtGreedy if model.durations else Greedy)(model, batch, max_symbols=max_symbols)


def greedy(model: Transducer, states: Tensor, lengths: Tensor, *, max_symbols: int = MAX_SYMBOLS) -> list[list[int]]:
    """Return the units that greedy search finds in states [B, T, dim] and lengths [B] from `model.encode`."""
    search = greedy_search(model, len(states), max_symbols=max_symbols)
    search.feed(states, lengths)
    return [results[0].units for results in search.finish()]
