"""The beam against all paths there are, against torchaudio's search, and against itself in other batches."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torchaudio.models import RNNTBeamSearch

from stillhouse.train.decode.beam import Beam
from stillhouse.train.decode.greedy import Greedy, greedy_search
from stillhouse.train.model.transducer import BLANK, Transducer


def small_model(size: int, predictor: str = "stateless", sharp: float = 6.0, **options) -> Transducer:
    torch.manual_seed(3)
    encoder = {"dim": 16, "layers": 1, "heads": 2, "inner": 16, "kernel": 3}
    model = Transducer(size, encoder, predictor=predictor, predictor_dim=16, joint_dim=32, **options).eval()
    with torch.no_grad():
        model.joint.output.weight.mul_(sharp)
        model.joint.output.bias[BLANK] += 1.0
    return model


def log_probabilities(model: Transducer, state: torch.Tensor, units: tuple[int, ...], penalty: float) -> np.ndarray:
    with torch.no_grad():
        predicted = model.predictor(torch.tensor([units], dtype=torch.int64).reshape(1, -1))[0, -1]
        logits = model.joint(model.joint.encoder(state), model.joint.predictor(predicted))
        logits[BLANK] -= penalty
        return logits.double().log_softmax(-1).numpy()


class Bigram:
    """A fusion whose state is the last unit; the end costs what `table` says for unit 0."""

    start = 0

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)

    def row(self, state: int) -> np.ndarray:
        return self.table[state]

    def advance(self, state: int, unit: int) -> int:
        return unit

    def final(self, state: int) -> float:
        return float(self.table[state, 0])

    def reset(self) -> None: ...


def every_path(model, states, max_symbols, *, bigram=None, penalty=0.0, ilm=0.0) -> dict[tuple[int, ...], float]:
    """Log-probability of every sequence of units that some path spells, all its paths added up, and its fused terms."""
    frames, size = len(states), model.size
    cache: dict = {}

    def p(t, units):
        if (t, units) not in cache:
            cache[t, units] = log_probabilities(model, states[t], units, penalty)
        return cache[t, units]

    per_frame = [s for n in range(max_symbols + 1) for s in itertools.product(range(1, size), repeat=n)]
    found: dict[tuple[int, ...], float] = {}
    for choice in itertools.product(per_frame, repeat=frames):
        units: tuple[int, ...] = ()
        score = 0.0
        for t, emitted in enumerate(choice):
            for unit in emitted:
                score += p(t, units)[unit]
                units += (unit,)
            score += p(t, units)[BLANK]
        found[units] = np.logaddexp(found.get(units, -np.inf), score)
    for units in found:
        for before, unit in zip((0, *units), units):
            found[units] += float(bigram.table[before, unit]) if bigram is not None else 0.0
        if bigram is not None:
            found[units] += bigram.final(units[-1] if units else 0)
        if ilm:
            for k, unit in enumerate(units):
                with torch.no_grad():
                    predicted = model.predictor(torch.tensor([units[:k]], dtype=torch.int64).reshape(1, -1))[0, -1]
                    logits = model.joint.output(torch.tanh(model.joint.predictor(predicted)))[1:].double()
                found[units] -= ilm * float(logits.log_softmax(-1)[unit - 1])
    return found


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_wide_beam_is_exact(predictor: str, fused: bool) -> None:
    model = small_model(3, predictor, sharp=3.0)
    torch.manual_seed(8)
    states = torch.randn(1, 3, 16)
    bigram = Bigram(np.random.default_rng(0).normal(size=(3, 3))) if fused else None
    terms = {"blank_penalty": 0.7, "ilm_weight": 0.4} if fused else {}
    expected = every_path(model, states[0], 2, bigram=bigram, penalty=0.7 if fused else 0.0, ilm=0.4 if fused else 0.0)
    search = Beam(model, 1, width=len(expected), max_symbols=2, fusion=bigram, **terms)
    search.feed(states, torch.tensor([3]))
    found = {tuple(e.units): e.score for e in search.finish()[0]}
    assert len(expected) == 127
    assert found.keys() == expected.keys()
    assert max(abs(found[u] - expected[u]) for u in expected) < 1e-4
    assert [e.score for e in search.finish()[0]] == sorted(found.values(), reverse=True)
    if not fused:  # the best found of fewer is never better than the best there is
        best = max(expected.values())
        for width in (1, 2, 4, 8):
            narrow = Beam(model, 1, width=width, max_symbols=2)
            narrow.feed(states, torch.tensor([3]))
            assert narrow.finish()[0][0].score <= best + 1e-4


class Outside:
    """Our transducer as what RNNTBeamSearch asks for: blank last, states as lists of lists of tensors."""

    def __init__(self, model: Transducer) -> None:
        self.model = model

    def transcribe(self, states, lengths):
        return states, lengths

    def predict(self, units, lengths, state):
        model, units = self.model, units[:, 0]
        where = torch.ones(len(units), dtype=torch.bool)
        if state is None:
            inside = model.predictor.initial(1, units.device)
        else:
            old = tuple(s[0] for s in state)
            inside = model.predictor.advance(old[0] if len(old) == 1 else old, units + 1, where)
        parts = inside if isinstance(inside, tuple) else (inside,)
        return model.predictor.step(inside)[:, None], lengths, [[p] for p in parts]

    def join(self, states, _, predicted, __):
        logits = self.model.joint(
            self.model.joint.encoder(states)[:, :, None], self.model.joint.predictor(predicted)[:, None]
        )
        return logits.roll(-1, dims=-1), None, None


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
@pytest.mark.parametrize("width", [2, 5])
def test_the_search_is_torchaudios(predictor: str, width: int) -> None:
    model = small_model(7, predictor)
    torch.manual_seed(5)
    states, lengths = torch.randn(4, 20, 16), torch.tensor([20, 11, 1, 16])
    search = Beam(model, 4, width=width, max_symbols=3)
    search.feed(states, lengths)
    outside = RNNTBeamSearch(Outside(model), blank=6, hypo_sort_key=lambda h: h[3], step_max_tokens=3)
    for b, found in enumerate(search.finish()):
        with torch.no_grad():
            theirs = outside(states[b, : lengths[b]], lengths[b], width)
        assert [e.units for e in found] == [[u + 1 for u in h[0][1:]] for h in theirs]
        assert [e.score for e in found] == pytest.approx([h[3] for h in theirs], abs=1e-3)
    assert sum(len(row[0].units) for row in search.finish()) > 6


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_pieces_and_company_change_nothing(kind: str) -> None:
    model = small_model(6, "lstm")
    torch.manual_seed(6)
    states, lengths = torch.randn(3, 23, 16), torch.tensor([23, 9, 17])

    def new(batch: int):
        return Greedy(model, batch) if kind == "greedy" else Beam(model, batch, width=4)

    whole = new(3)
    whole.feed(states, lengths)
    together = whole.finish()
    for b in range(3):
        alone = new(1)
        at = 0
        for size in (1, 5, 2, 30):
            part = states[b : b + 1, at : min(at + size, int(lengths[b]))]
            alone.feed(part, torch.tensor([part.shape[1]]))
            at += size
        for mine, ours in zip(alone.finish()[0], together[b], strict=True):
            assert (mine.units, mine.frames) == (ours.units, ours.frames)
            assert mine.confidence == pytest.approx(ours.confidence, abs=1e-5)
            assert mine.score == pytest.approx(ours.score, abs=1e-3)
            assert len(mine.frames) == len(mine.confidence) == len(mine.units)
            assert mine.frames == sorted(mine.frames) and all(t < lengths[b] for t in mine.frames)
            assert all(0 <= p <= 1 for p in mine.confidence)


def test_greedys_score_and_confidence_are_its_paths() -> None:
    model = small_model(5)
    torch.manual_seed(7)
    states = torch.randn(1, 12, 16)
    search = Greedy(model, 1, max_symbols=2)
    search.feed(states, torch.tensor([12]))
    (found,) = search.finish()[0]
    score, said, sure = 0.0, 0, []
    for t in range(12):
        for symbol in range(3):
            p = log_probabilities(model, states[0, t], tuple(found.units[:said]), 0.0)
            if symbol == 2 or found.frames[said : said + 1] != [t]:
                score += p[BLANK]
                break
            unit = found.units[said]
            score += p[unit]
            sure.append(math.exp(p[unit]) / (1 - math.exp(p[BLANK])))
            said += 1
    assert said == len(found.units) > 3
    assert found.score == pytest.approx(score, abs=1e-4)
    assert found.confidence == pytest.approx(sure, abs=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_unit_ends_its_frame_in_a_model_of_one_unit_a_state(fused: bool) -> None:
    """All paths of four frames, each with a blank or one unit, and no blank behind the unit."""
    model = small_model(3, sharp=3.0, durations=(1,))
    torch.manual_seed(8)
    states = torch.randn(1, 4, 16)
    bigram = Bigram(np.random.default_rng(0).normal(size=(3, 3))) if fused else None
    expected: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=4):
        units: tuple[int, ...] = ()
        score = 0.0
        for t, unit in enumerate(path):
            score += log_probabilities(model, states[0, t], units, 0.0)[unit]
            units += (unit,) if unit else ()
        expected[units] = np.logaddexp(expected.get(units, -np.inf), score)
    assert np.exp(list(expected.values())).sum() == pytest.approx(1)
    if bigram is not None:
        for units in expected:
            expected[units] += sum(float(bigram.table[a, b]) for a, b in zip((0, *units), (*units, 0)))
    search = Beam(model, 1, width=len(expected), fusion=bigram)
    search.feed(states, torch.tensor([4]))
    found = {tuple(e.units): e.score for e in search.finish()[0]}
    assert found == pytest.approx(expected, abs=1e-4) and len(found) == 31
    greedy, units = greedy_search(model, 1), ()
    greedy.feed(states, torch.tensor([4]))
    for state in states[0]:
        best = int(log_probabilities(model, state, units, 0.0).argmax())
        units += (best,) if best else ()
    assert tuple(greedy.finish()[0][0].units) == units
