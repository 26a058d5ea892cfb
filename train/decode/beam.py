"""Time-synchronous beam search over a batch: in each frame a hypothesis emits up to max_symbols units, then a blank.

Hypotheses with the same units are merged and their probabilities added (logaddexp). If the beam holds every
hypothesis, the score is the exact log-probability of the units over all alignments of at most max_symbols a frame.
The search is that of `torchaudio.models.RNNTBeamSearch` (Graves 2012, arXiv 1211.3711, breadth-first in a frame), with
shallow fusion, for all utterances and hypotheses of a batch at once. Tests compare the two.

Guarantees: fused terms depend on the units alone, so merged hypotheses have equal ones.
Try: `stillhouse decode RUN CORPUS FEATURES --beam 8`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ...data.errors import ConfigError
from ..model.transducer import BLANK, Transducer
from .emissions import Emissions
from .greedy import MAX_SYMBOLS, unit_confidence

CACHED_ROWS = 4096


class Fusion(Protocol):
    """Weighted scores of units given the units before them, in natural logarithms. States are small integers."""

    start: int

    def row(self, state: int) -> np.ndarray:
        """Return float32 [V]: what each unit adds. The blank adds nothing."""

    def advance(self, state: int, unit: int) -> int:
        """Return the state after one more unit."""

    def final(self, state: int) -> float:
        """Return what the end of the utterance adds."""

    def reset(self) -> None:
        """Forget all states but `start`."""


class Beams(NamedTuple):
    """K hypotheses of each of B utterances. The acoustic score of an unused place is -inf."""

    acoustic: Tensor  # float64 [B, K]
    fused: Tensor  # float64 [B, K]
    key: Tensor  # int64 [B, K], a hash of the units
    node: Tensor  # int64 [B, K], the last emission in Backpointers, -1 for none
    fusion: Tensor  # int64 [B, K] on the CPU, states of the Fusion
    predictor: Any  # state of the prediction network: a tensor [B, K, ...] or a tuple of such
    predicted: Tensor  # float32 [B, K, J], output of the prediction network, projected for the joint

    @property
    def total(self) -> Tensor:
        return self.acoustic + self.fused


class Backpointers:
    """All emissions as a forest of (parent, unit, frame, confidence)."""

    def __init__(self) -> None:
        self.links: list[tuple[int, int, int, float]] = []

    def add(self, *columns: Tensor) -> Tensor:
        """Add emissions, given as parents, units, frames and confidences, and return their numbers."""
        first = len(self.links)
        self.links += zip(*(column.tolist() for column in columns))
        return torch.arange(first, len(self.links))

    def path(self, node: int) -> tuple[list[int], list[int], list[float]]:
        """Return units, frames and confidences from the start to `node`."""
        chain = []
        while node >= 0:
            chain.append(self.links[node])
            node = self.links[node][0]
        chain.reverse()
        return [link[1] for link in chain], [link[2] for link in chain], [link[3] for link in chain]


@dataclass(eq=False)
class Beam:
    """A Search (see greedy.py) that keeps `width` hypotheses of each of `batch` utterances.

    `fusion` adds a language model. blank_penalty is subtracted from the logit of the blank. ilm_weight times the score
    of the internal language model (`Joint.internal`) is subtracted from the score of each unit. Raises ConfigError if
    the model has durations other than 1. With that one, a unit ends its frame, as a blank does.
    """

    model: Transducer
    batch: int
    _: KW_ONLY
    width: int
    max_symbols: int = MAX_SYMBOLS
    fusion: Fusion | None = None
    blank_penalty: float = 0.0
    ilm_weight: float = 0.0

    def __post_init__(self) -> None:
        model, batch, width, fusion = self.model, self.batch, self.width, self.fusion
        if model.durations and not model.one_unit:
            raise ConfigError(
                "the beam goes frame by frame, but this model was trained to skip frames (loss.kind = tdt)",
                remedy="decode with --beam 1, which is greedy",
            )
        self.device = model.joint.output.weight.device
        if fusion is not None:
            fusion.reset()
        self.rows: dict[int, Tensor] = {}
        self.pointers = Backpointers()
        self.frames = torch.zeros(batch, dtype=torch.int64)
        acoustic = torch.full((batch, width), -torch.inf, dtype=torch.float64, device=self.device)
        acoustic[:, 0] = 0.0
        with torch.no_grad():
            self.beams = Beams(
                acoustic,
                torch.zeros_like(acoustic),
                torch.zeros(batch, width, dtype=torch.int64, device=self.device),
                torch.full((batch, width), -1, dtype=torch.int64, device=self.device),
                torch.full((batch, width), fusion.start if fusion is not None else 0),
                *self._predict(model.predictor.initial(batch * width, self.device)),
            )

    @torch.no_grad()
    def feed(self, states: Tensor, lengths: Tensor) -> None:
        projected = self.model.joint.encoder(states).float()
        lengths = lengths.cpu().clamp(max=states.shape[1])
        for t in range(int(lengths.max()) if len(lengths) else 0):
            self._search_frame(projected[:, t], lengths > t, t)
        self.frames += lengths

    def best(self) -> list[list[Emissions]]:
        return self._results(self.beams)

    def finish(self) -> list[list[Emissions]]:
        beams = self.beams
        if self.fusion is not None:
            ends = [[self.fusion.final(state) for state in row] for row in beams.fusion.tolist()]
            beams = beams._replace(fused=beams.fused + torch.tensor(ends).to(beams.fused))
        return self._results(beams)

    def _results(self, beams: Beams) -> list[list[Emissions]]:
        results = []
        nodes, acoustic, fused = beams.node.tolist(), beams.acoustic.tolist(), beams.fused.tolist()
        for b, order in enumerate(beams.total.argsort(dim=1, descending=True, stable=True).tolist()):
            used = [k for k in order if acoustic[b][k] > -np.inf]
            results.append([Emissions(*self.pointers.path(nodes[b][k]), acoustic[b][k], fused[b][k]) for k in used])
        return results

    def _predict(self, states: Any) -> tuple[Any, Tensor]:
        """Shape states of the prediction network from [B * K, ...] to [B, K, ...], and add its projected output."""
        predicted = self.model.joint.predictor(self.model.predictor.step(states)).float()
        return _map(lambda x: x.unflatten(0, (self.batch, self.width)), (states, predicted))

    def _search_frame(self, encoded: Tensor, active: Tensor, t: int) -> None:
        """Search one frame [B, J] of the utterances that are `active` [B]."""
        active = active.to(self.device)
        beams = self.beams._replace(acoustic=torch.where(active[:, None], self.beams.acoustic, -torch.inf))
        done: Beams | None = None  # hypotheses that have left the frame by a blank
        for symbol in range(self.max_symbols + 1):
            logits = self.model.joint(encoded[:, None], beams.predicted).float()
            logits[..., BLANK] -= self.blank_penalty
            logp = logits.log_softmax(-1)
            ended = beams._replace(acoustic=beams.acoustic + logp[..., BLANK])
            done = ended if done is None else _map(lambda x, y: torch.cat([x, y], dim=1), done, ended)
            if symbol == self.max_symbols:
                break
            done = _merge_equal(done)
            bar = done.total.topk(self.width, dim=1).values[:, -1:]
            longer = self._extend(beams, logp, bar, t)
            if longer is None:
                break
            if self.model.one_unit:
                done = _map(lambda x, y: torch.cat([x, y], dim=1), done, longer)
                break
            beams = longer
        assert done is not None
        done = _merge_equal(done)
        best = _select(done, done.total.topk(self.width, dim=1).indices)
        if not bool(active.all()):
            best = _map(
                lambda x, y: torch.where(active.to(x.device).view(-1, *[1] * (x.dim() - 1)), x, y), best, self.beams
            )
        self.beams = best

    def _extend(self, beams: Beams, logp: Tensor, bar: Tensor, t: int) -> Beams | None:
        """Return the best `width` hypotheses with one more unit that score above `bar` [B, 1], or None without any."""
        B, K, V = logp.shape
        added = self._added_scores(beams, logp)
        gain = logp.clone() if added is None else logp + added
        gain[..., BLANK] = -torch.inf
        total = beams.total
        # Relative to the best, because float32 would lose the digits of long utterances.
        top = total.amax(dim=1, keepdim=True).clamp(min=-1e30)
        values, index = ((total - top).float()[:, :, None] + gain).view(B, K * V).topk(K, dim=1)
        parent, unit = index // V, index % V
        alive = (values > -torch.inf) & (values.double() + top > bar)
        if not bool(alive.any()):
            return None
        parents = _select(beams, parent)
        unit_logp = logp.view(B, K * V).gather(1, index)
        acoustic = torch.where(alive, parents.acoustic + unit_logp, -torch.inf)
        fused = parents.fused
        if added is not None:
            fused = torch.where(alive, fused + added.view(B, K * V).gather(1, index), 0.0)
        key = (parents.key ^ (unit + 1) * 0x1E3779B97F4A7C15) * 0x2545F4914F6CDD1D
        flat = _map(lambda x: x.flatten(0, 1), parents.predictor)
        states = self.model.predictor.advance(flat, unit.reshape(-1), alive.reshape(-1))
        confidence = unit_confidence(unit_logp, logp[..., BLANK].gather(1, parent))
        where, units, node = alive.cpu(), unit.cpu(), parents.node.cpu()
        frames = (self.frames[:, None] + t).expand(B, K)
        node[where] = self.pointers.add(*(x.cpu()[where] for x in (node, units, frames, confidence)))
        fusion = parents.fusion
        if self.fusion is not None:
            fusion = fusion.clone()
            pairs = zip(fusion[where].tolist(), units[where].tolist())
            fusion[where] = torch.tensor([self.fusion.advance(state, u) for state, u in pairs])
        return Beams(acoustic, fused, key ^ (key >> 29), node.to(self.device), fusion, *self._predict(states))

    def _added_scores(self, beams: Beams, logp: Tensor) -> Tensor | None:
        """Return float32 [B, K, V]: what fusion and the internal language model add to each unit's score."""
        added: Tensor | None = None
        if self.fusion is not None:
            added = self._fusion_rows(beams.fusion, beams.acoustic > -torch.inf)
        if self.ilm_weight:
            inner = -self.ilm_weight * self.model.joint.internal(beams.predicted)
            inner[..., BLANK] = 0.0
            added = inner if added is None else added + inner
        return added

    def _fusion_rows(self, states: Tensor, alive: Tensor) -> Tensor:
        """Return the fusion's rows, float32 [B, K, V]. Those of unused places are arbitrary."""
        assert self.fusion is not None
        if len(self.rows) > CACHED_ROWS:
            self.rows.clear()
        needed = torch.where(alive.cpu(), states, self.fusion.start).reshape(-1).tolist()
        for state in set(needed) - self.rows.keys():
            self.rows[state] = torch.from_numpy(self.fusion.row(state)).to(self.device)
        return torch.stack([self.rows[state] for state in needed]).view(*states.shape, -1)


def _map(change: Callable[..., Tensor], *values: Any) -> Any:
    """Apply `change` to the tensors of `values`, which are tensors or equally nested tuples of tensors."""
    if not isinstance(values[0], tuple):
        return change(*values)
    parts = [_map(change, *tensors) for tensors in zip(*values)]
    return Beams(*parts) if isinstance(values[0], Beams) else tuple(parts)


def _select(beams: Beams, index: Tensor) -> Beams:
    """Return the places `index` [B, K] of beams [B, M]."""
    row = torch.arange(len(index), device=index.device)[:, None]
    return _map(lambda x: x[row.to(x.device), index.to(x.device)], beams)


def _merge_equal(beams: Beams) -> Beams:
    """Give the probability of equal hypotheses to the likeliest of them, and none to the others."""
    same = beams.key[:, :, None] == beams.key[:, None, :]  # [B, M, M]
    scores = torch.where(same, beams.acoustic[:, None, :], -torch.inf)
    first = scores.argmax(dim=2) == torch.arange(scores.shape[1], device=scores.device)
    return beams._replace(acoustic=torch.where(first, scores.logsumexp(dim=2), -torch.inf))
