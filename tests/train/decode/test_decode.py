"""Greedy decoding against the plain loop over one utterance."""

from __future__ import annotations

import pytest
import torch

from stillhouse.train.decode.greedy import greedy
from stillhouse.train.model.transducer import BLANK, Transducer


def plain(model: Transducer, states: torch.Tensor, max_symbols: int) -> list[int]:
    """One utterance, one frame, one unit at a time: states [T, dim]."""
    found: list[int] = []
    for state in states:
        for _ in range(max_symbols):
            history = torch.tensor([found], dtype=torch.int64).reshape(1, -1)
            predicted = model.predictor(history)[0, -1]
            unit = int(model.joint(model.joint.encoder(state), model.joint.predictor(predicted)).argmax())
            if unit == BLANK:
                break
            found.append(unit)
    return found


@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
def test_batched_greedy_equals_the_plain_loop(predictor: str) -> None:
    torch.manual_seed(1)
    encoder = {"dim": 16, "layers": 1, "heads": 2, "inner": 16, "kernel": 3}
    model = Transducer(6, encoder, predictor=predictor, predictor_dim=16, joint_dim=64).eval()
    with torch.no_grad():
        model.joint.output.weight.mul_(6)
        model.joint.output.bias[BLANK] += 1.0
        states, lengths = torch.randn(5, 30, 16), torch.tensor([30, 17, 1, 25, 9])
        found = greedy(model, states, lengths, max_symbols=3)
        expected = [plain(model, states[b, : lengths[b]], 3) for b in range(5)]
    assert found == expected
    assert sum(map(len, expected)) > 20 and any(len(e) < 3 * n for e, n in zip(expected, lengths))


def test_a_row_of_blanks_takes_a_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    encoder = {"dim": 16, "layers": 1, "heads": 2, "inner": 16, "kernel": 3}
    model = Transducer(6, encoder, predictor_dim=16, joint_dim=64).eval()
    frames = []

    def counted(encoded: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        frames.append(encoded.shape[1])
        return model.joint.output(model.joint.hidden(encoded, predicted))

    with torch.no_grad():
        model.joint.output.weight.mul_(6)
        model.joint.output.bias[BLANK] += 6.0
        states = torch.randn(1, 200, 16)
        expected = plain(model, states[0], 8)
        monkeypatch.setattr(model.joint, "forward", counted)
        found = greedy(model, states, torch.tensor([200]))
    assert found == [expected]
    assert 20 < len(found[0]) < 50
    assert len(frames) < 200 / 2 and sum(frames) < 2 * 200
