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
