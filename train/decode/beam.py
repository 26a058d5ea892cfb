"""Time-synchronous beam search over a batch: at each frame a hypothesis emits up to max_symbols units, then a blank.

Hypotheses of the same units are one, their probabilities added (logaddexp): with a beam that holds every hypothesis
the score of units is their exact log-probability over all alignments of at most max_symbols a frame. The search is
that of `torchaudio.models.RNNTBeamSearch` (Graves 2012, arXiv 1211.3711, breadth-first within a frame), with which
tests compare it, done for all utterances and hypotheses of a batch at once, with shallow fusion.

Invariant: fused terms depend on the units alone, so hypotheses that merge have the same. Exercised by
`stillhouse decode RUN CORPUS FEATURES --beam 8`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...data.errors import ConfigError
from ..model.transducer import BLANK, Transducer
from .emissions import Emissions
from .greedy import MAX_SYMBOLS, confidence

CACHED_ROWS = 4096


class Fusion(Protocol):
    """Scores of units by the units before them, weighted and in natural logarithms; states are small integers."""

    start: int

    def row(self, state: int) -> np.ndarray:
        """float32 [V]: what each unit adds; nothing is said of the blank."""

    def advance(self, state: int, unit: int) -> int: ...

    def final(self, state: int) -> float:
        """What the end adds."""

    def reset(self) -> None:
        """Forget all states but `start`."""


@dataclass(frozen=True)
class Slots:
    """K hypotheses of each of B utterances, or fewer: the acoustic score of what is none is -inf.

    `states` is the prediction network's, over B·K rows; `predicted` [B, K, J] its projection for the joint;
    `node` the last emission in the trace, -1 where there is none; `key` a hash of the units.
    """

    acoustic: Tensor  # float64 [B, K]
    fused: Tensor  # float64 [B, K]
    key: Tensor  # int64 [B, K]
    node: Tensor  # int64 [B, K]
    heard: Tensor  # int64 [B, K] on the host: the fusion's states
    states: Any
    predicted: Tensor

    @property
    def total(self) -> Tensor:
        return self.acoustic + self.fused


class Trace:
    """Emissions as a forest: parent, unit, frame, how sure; grows without copying what is there each time."""

    def __init__(self) -> None:
        self.size = 0
        self.links = np.empty((1024, 3), np.int64)
        self.sure = np.empty(1024, np.float32)

    def add(self, parents: np.ndarray, units: np.ndarray, frames: np.ndarray, sure: np.ndarray) -> np.ndarray:
        """Numbers of the new emissions."""
        first, self.size = self.size, self.size + len(parents)
        if self.size > len(self.links):
            self.links = np.concatenate([self.links, np.empty((max(len(self.links), self.size), 3), np.int64)])
            self.sure = np.concatenate([self.sure, np.empty(len(self.links) - len(self.sure), np.float32)])
        self.links[first : self.size] = np.stack([parents, units, frames], axis=1)
        self.sure[first : self.size] = sure
        return np.arange(first, self.size)

    def back(self, node: int) -> tuple[list[int], list[int], list[float]]:
        """Units, frames and sureness from the beginning to `node`."""
        chain = []
        while node >= 0:
            chain.append(node)
            node = int(self.links[node, 0])
        chain.reverse()
        return self.links[chain, 1].tolist(), self.links[chain, 2].tolist(), self.sure[chain].tolist()


class Beam:
    """The search of `batch` utterances, `width` hypotheses each.

    blank_penalty is taken off the blank's logit; ilm_weight times the internal language model's log-probability (the
    joint without its encoder, over units that are not blank; Meng et al. 2021, arXiv 2011.01991) off each unit's.
    """

    def __init__(
        self,
        model: Transducer,
        batch: int,
        *,
        width: int,
        max_symbols: int = MAX_SYMBOLS,
        fusion: Fusion | None = None,
        blank_penalty: float = 0.0,
        ilm_weight: float = 0.0,
    ) -> None:
        if model.durations:
            raise ConfigError(
                "the beam walks frame by frame, and this model was trained to step over frames (loss.kind = tdt)",
                remedy="decode it greedily",
            )
        self.model, self.batch, self.width, self.max_symbols = model, batch, width, max_symbols
        self.fusion, self.blank_penalty, self.ilm_weight = fusion, blank_penalty, ilm_weight
        self.device = model.joint.output.weight.device
        if fusion is not None:
            fusion.reset()
        self.rows: dict[int, Tensor] = {}
        self.trace = Trace()
        self.frames = torch.zeros(batch, dtype=torch.int64)
        acoustic = torch.full((batch, width), -torch.inf, dtype=torch.float64, device=self.device)
        acoustic[:, 0] = 0.0
        with torch.no_grad():
            states = model.predictor.initial(batch * width, self.device)
            self.slots = Slots(
                acoustic,
                torch.zeros_like(acoustic),
                torch.zeros(batch, width, dtype=torch.int64, device=self.device),
                torch.full((batch, width), -1, dtype=torch.int64, device=self.device),
                torch.full((batch, width), fusion.start if fusion is not None else 0),
                states,
                self._project(states),
            )

    @torch.no_grad()
    def feed(self, states: Tensor, lengths: Tensor) -> None:
        projected = self.model.joint.encoder(states).float()
        lengths = lengths.cpu().clamp(max=states.shape[1])
        for t in range(int(lengths.max()) if len(lengths) else 0):
            self._frame(projected[:, t], lengths > t, t)
        self.frames += lengths

    def best(self) -> list[list[Emissions]]:
        return self._told(self.slots)

    def finish(self) -> list[list[Emissions]]:
        if self.fusion is None:
            return self._told(self.slots)
        ends = [[self.fusion.final(state) for state in row] for row in self.slots.heard.tolist()]
        return self._told(replace(self.slots, fused=self.slots.fused + torch.tensor(ends).to(self.slots.fused)))

    def _told(self, slots: Slots) -> list[list[Emissions]]:
        told = []
        nodes, acoustic, fused = slots.node.tolist(), slots.acoustic.tolist(), slots.fused.tolist()
        for b, order in enumerate(slots.total.argsort(dim=1, descending=True, stable=True).tolist()):
            alive = [k for k in order if acoustic[b][k] > -np.inf]
            told.append([Emissions(*self.trace.back(nodes[b][k]), acoustic[b][k], fused[b][k]) for k in alive])
        return told

    def _project(self, states: Any) -> Tensor:
        found = self.model.joint.predictor(self.model.predictor.step(states)).float()
        return found.view(self.batch, self.width, -1)

    def _frame(self, encoded: Tensor, active: Tensor, t: int) -> None:
        """One frame [B, J] of the utterances that are `active` [B]."""
        running = active.to(self.device)[:, None]
        slots = replace(self.slots, acoustic=torch.where(running, self.slots.acoustic, -torch.inf))
        done: Slots | None = None
        for symbol in range(self.max_symbols + 1):
            logits = self.model.joint(encoded[:, None], slots.predicted).float()
            logits[..., BLANK] -= self.blank_penalty
            logp = logits.log_softmax(-1)
            ended = replace(slots, acoustic=slots.acoustic + logp[..., BLANK])
            done = ended if done is None else _joined(done, ended)
            if symbol == self.max_symbols:
                break
            done = _merged(done)
            bar = done.total.topk(self.width, dim=1).values[:, -1:]
            grown = self._extended(slots, logp, bar, t)
            if grown is None:
                break
            slots = grown
        assert done is not None
        done = _merged(done)
        chosen = done.total.topk(self.width, dim=1).indices
        self.slots = _where(running, _picked(done, chosen), self.slots)

    def _extended(self, slots: Slots, logp: Tensor, bar: Tensor, t: int) -> Slots | None:
        """The best `width` hypotheses of each utterance with one more unit, those above `bar`; None: there are none."""
        B, K, V = logp.shape
        extra = self._fused(slots, logp)
        gain = logp.clone() if extra is None else logp + extra
        gain[..., BLANK] = -torch.inf
        total = slots.total
        top = total.amax(dim=1, keepdim=True).clamp(min=-1e30)  # in float32 beside the best, which keeps the digits
        values, index = ((total - top).float()[:, :, None] + gain).view(B, K * V).topk(K, dim=1)
        parent, unit = index // V, index % V
        alive = (values > -torch.inf) & (values.double() + top > bar)
        if not bool(alive.any()):
            return None
        picked = _picked(slots, parent)
        chosen = logp.view(B, K * V).gather(1, index)
        acoustic = torch.where(alive, picked.acoustic + chosen, -torch.inf)
        fused = picked.fused
        if extra is not None:
            fused = torch.where(alive, fused + extra.view(B, K * V).gather(1, index), 0.0)
        key = (picked.key ^ (unit + 1) * 0x1E3779B97F4A7C15) * 0x2545F4914F6CDD1D
        states = self.model.predictor.advance(picked.states, unit.reshape(-1), alive.reshape(-1))
        sure = confidence(chosen, logp[..., BLANK].gather(1, parent))
        where, units = alive.cpu(), unit.cpu()
        node = picked.node.cpu()
        frames = (self.frames[:, None] + t).expand(B, K)
        node[where] = torch.from_numpy(
            self.trace.add(*(x.cpu()[where].numpy() for x in (node, units, frames, sure))),
        )
        heard = picked.heard
        if self.fusion is not None:
            heard = heard.clone()
            pairs = zip(heard[where].tolist(), units[where].tolist())
            heard[where] = torch.tensor([self.fusion.advance(state, u) for state, u in pairs])
        return Slots(acoustic, fused, key ^ (key >> 29), node.to(self.device), heard, states, self._project(states))

    def _fused(self, slots: Slots, logp: Tensor) -> Tensor | None:
        """float32 [B, K, V]: what each unit adds beside the transducer's own score."""
        extra: Tensor | None = None
        if self.fusion is not None:
            extra = self._rows(slots.heard, slots.acoustic > -torch.inf)
        if self.ilm_weight:
            inner = self.model.joint(torch.zeros_like(slots.predicted[:, :1]), slots.predicted).float()
            inner[..., BLANK] = -torch.inf
            inner = -self.ilm_weight * inner.log_softmax(-1)
            inner[..., BLANK] = 0.0
            extra = inner if extra is None else extra + inner
        return extra

    def _rows(self, heard: Tensor, alive: Tensor) -> Tensor:
        """float32 [B, K, V] of the fusion's rows; rows of what is not alive may be any."""
        assert self.fusion is not None
        if len(self.rows) > CACHED_ROWS:
            self.rows.clear()
        states = torch.where(alive.cpu(), heard, self.fusion.start).reshape(-1).tolist()
        for state in set(states) - self.rows.keys():
            self.rows[state] = torch.from_numpy(self.fusion.row(state)).to(self.device)
        return torch.stack([self.rows[state] for state in states]).view(*heard.shape, -1)


def _each(states: Any, change: Any) -> Any:
    return tuple(_each(s, change) for s in states) if isinstance(states, tuple) else change(states)


def _picked(slots: Slots, index: Tensor) -> Slots:
    """Slots [B, K] of slots [B, M], by index [B, K]."""
    B, M = slots.key.shape
    flat = (torch.arange(B, device=index.device)[:, None] * M + index).reshape(-1)
    on_host = index.to(slots.heard.device)
    return Slots(
        slots.acoustic.gather(1, index),
        slots.fused.gather(1, index),
        slots.key.gather(1, index),
        slots.node.gather(1, index),
        slots.heard.gather(1, on_host),
        _each(slots.states, lambda s: s.index_select(0, flat)),
        slots.predicted.reshape(B * M, -1).index_select(0, flat).view(B, index.shape[1], -1),
    )


def _joined(a: Slots, b: Slots) -> Slots:
    """Side by side: [B, Ma + Mb]."""
    B = len(a.key)

    def beside(x: Any, y: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(beside, x, y))
        return torch.cat([x.view(B, -1, *x.shape[1:]), y.view(B, -1, *y.shape[1:])], dim=1).flatten(0, 1)

    names = ("acoustic", "fused", "key", "node", "heard")
    side = {name: torch.cat([getattr(a, name), getattr(b, name)], dim=1) for name in names}
    return Slots(**side, states=beside(a.states, b.states), predicted=torch.cat([a.predicted, b.predicted], dim=1))


def _merged(slots: Slots) -> Slots:
    """Equal hypotheses become the likeliest of them, with the probability of all."""
    same = slots.key[:, :, None] == slots.key[:, None, :]  # (B, M, M)
    scores = torch.where(same, slots.acoustic[:, None, :], -torch.inf)
    first = scores.argmax(dim=2) == torch.arange(scores.shape[1], device=scores.device)
    return replace(slots, acoustic=torch.where(first, scores.logsumexp(dim=2), -torch.inf))


def _where(running: Tensor, new: Slots, old: Slots) -> Slots:
    """`new` of the utterances that run [B, 1], `old` of those that have ended."""
    if bool(running.all()):
        return new
    B, K = old.key.shape
    rows = running.expand(B, K).reshape(-1)

    def either(x: Any, y: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(either, x, y))
        return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y)

    names = ("acoustic", "fused", "key", "node")
    chosen = {name: torch.where(running, getattr(new, name), getattr(old, name)) for name in names}
    heard = torch.where(running.cpu(), new.heard, old.heard)
    predicted = torch.where(running[:, :, None], new.predicted, old.predicted)
    return Slots(**chosen, heard=heard, states=either(new.states, old.states), predicted=predicted)
