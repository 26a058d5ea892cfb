"""Greedy search: the best unit at every step; for a token-and-duration transducer also the best duration.

Invariant: an utterance's hypothesis depends neither on the rest of its batch (to float rounding) nor on the pieces in
which its encoder states came. Exercised by `stillhouse decode`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..model.transducer import BLANK, Transducer
from .emissions import Emissions

MAX_SYMBOLS = 8  # a frame


class Search(Protocol):
    """A decoder of a batch, fed with encoder states as they come."""

    def feed(self, states: Tensor, lengths: Tensor) -> None:
        """States [B, T, dim]; of utterance b the first lengths[b] count."""

    def best(self) -> list[list[Emissions]]:
        """What was found so far for each utterance, best first; feeding may go on."""

    def finish(self) -> list[list[Emissions]]:
        """As `best`, of utterances that end here."""


def confidence(unit: Tensor, blank: Tensor) -> Tensor:
    """P(unit | not blank) from their log-probabilities: what the model thinks was said, whenever it was."""
    return torch.exp(unit - torch.log(-torch.expm1(blank.clamp(max=-1e-7)))).clamp(max=1.0)


class Greedy:
    """Best unit at every step, at most `max_symbols` a frame, of `batch` utterances."""

    def __init__(self, model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> None:
        self.model, self.max_symbols, self.batch = model, max_symbols, batch
        self.device = model.joint.output.weight.device
        self.state = model.predictor.initial(batch, self.device)
        self.predicted = model.joint.predictor(model.predictor.step(self.state))
        self.frames = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.score = torch.zeros(batch, dtype=torch.float64, device=self.device)
        self.found: list[list[tuple[int, int, float]]] = [[] for _ in range(batch)]  # unit, frame, sure

    @torch.no_grad()
    def feed(self, states: Tensor, lengths: Tensor) -> None:
        model = self.model
        projected = model.joint.encoder(states).float()
        lengths = lengths.to(self.device)
        emitted: list[tuple[Tensor, ...]] = []  # where, units, frames, sure [B]; to the host at the end
        for t in range(states.shape[1]):
            active = lengths > t
            for symbol in range(self.max_symbols + 1):
                logp = model.joint(projected[:, t], self.predicted).float().log_softmax(-1)
                unit = logp.argmax(-1) if symbol < self.max_symbols else torch.full_like(lengths, BLANK)
                best = logp.gather(1, unit[:, None])[:, 0]
                self.score += torch.where(active, best, 0.0)
                active = active & (unit != BLANK)
                if not bool(active.any()):
                    break
                emitted.append((active, unit, self.frames + t, confidence(best, logp[:, BLANK])))
                self.state = model.predictor.advance(self.state, unit, active)
                self.predicted = model.joint.predictor(model.predictor.step(self.state))
        self.frames += lengths.clamp(max=states.shape[1])
        self._keep(emitted)

    def _keep(self, emitted: list[tuple[Tensor, ...]]) -> None:
        if emitted:
            where, units, frames, sure = (torch.stack(column, dim=1).cpu() for column in zip(*emitted))
            for b, mine in enumerate(where):
                self.found[b] += zip(units[b][mine].tolist(), frames[b][mine].tolist(), sure[b][mine].tolist())

    def best(self) -> list[list[Emissions]]:
        scores = self.score.tolist()
        return [
            [Emissions([u for u, _, _ in mine], [t for _, t, _ in mine], [p for _, _, p in mine], score)]
            for mine, score in zip(self.found, scores)
        ]

    finish = best


class TdtGreedy(Greedy):
    """A Search (see decode.py) of `batch` utterances; at most `max_symbols` units a frame."""

    def __init__(self, model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> None:
        super().__init__(model, batch, max_symbols=max_symbols)
        self.durations = torch.tensor(model.durations, device=self.device)
        self.ahead = torch.zeros(batch, dtype=torch.int64, device=self.device)  # frames into the next states
        self.here = torch.zeros(batch, dtype=torch.int64, device=self.device)  # units emitted at the present frame

    @torch.no_grad()
    def feed(self, states: Tensor, lengths: Tensor) -> None:
        model, rows = self.model, torch.arange(self.batch, device=self.device)
        lengths = lengths.to(self.device).clamp(max=states.shape[1])
        projected = model.joint.encoder(states).float()
        t = self.ahead
        emitted: list[tuple[Tensor, ...]] = []
        while bool((active := t < lengths).any()):
            frame = projected[rows, t.clamp(max=states.shape[1] - 1)]
            tokens, steps = model.joint.with_durations(frame, self.predicted)
            logp, steps = tokens.float().log_softmax(-1), steps.float().log_softmax(-1)
            best, unit = logp.max(-1)
            must_move = (unit == BLANK) | (self.here + 1 >= self.max_symbols)
            held = must_move[:, None] & (self.durations == 0)
            sure, choice = steps.masked_fill(held, float("-inf")).max(-1)
            moved = self.durations[choice]
            self.score += torch.where(active, best + sure, 0.0)
            speaks = active & (unit != BLANK)
            emitted.append((speaks, unit, self.frames + t, confidence(best, logp[:, BLANK])))
            self.state = model.predictor.advance(self.state, unit, speaks)
            self.predicted = model.joint.predictor(model.predictor.step(self.state))
            t = torch.where(active, t + moved, t)
            self.here = torch.where(active, torch.where(moved > 0, 0, self.here + 1), self.here)
        self.ahead = t - lengths
        self.frames += lengths
        self._keep(emitted)


def greedy_search(model: Transducer, batch: int, *, max_symbols: int = MAX_SYMBOLS) -> Greedy:
    """The greedy search that the model's loss asks for."""
    if model.durations:
        return TdtGreedy(model, batch, max_symbols=max_symbols)
    return Greedy(model, batch, max_symbols=max_symbols)


def greedy(model: Transducer, states: Tensor, lengths: Tensor, *, max_symbols: int = MAX_SYMBOLS) -> list[list[int]]:
    """The units that greedy decoding finds of states [B, T, dim] and lengths [B] from `model.encode`."""
    search = greedy_search(model, len(states), max_symbols=max_symbols)
    search.feed(states, lengths)
    return [found[0].units for found in search.finish()]
