"""Greedy decoding of a token-and-duration transducer: the best unit and the best duration at every step.

A blank moves on by the likeliest duration above 0, as in the loss, and so does a unit that would be one too many for
its frame. Invariant: that of decode.py; each utterance has its own place, and a step that leads behind the states that
have come goes on in the next ones. Exercised by `stillhouse decode` on a run with loss.kind = "tdt".
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.transducer import BLANK, Transducer
from .decode import MAX_SYMBOLS, Greedy, confidence


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
