"""Aligners: planted alignments are recovered, the text never enters the state, the occupancy is not trained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from stillhouse.data.errors import ConfigError
from stillhouse.distill.aligners import Attention, Cif, Occupancy, Predictor, Transport
from stillhouse.distill.batch import Positions


def positions_of(tokens: list[list[int]], **more) -> Positions:
    """Token positions: row n of the embedding table is the token of number n."""
    lengths = torch.tensor([len(t) for t in tokens])
    grid = max(1, int(lengths.max()))
    row = torch.tensor([b * grid + p for b, t in enumerate(tokens) for p in range(len(t))])
    flat = torch.tensor([n for t in tokens for n in t])
    place = torch.tensor([(p + 0.5) / len(t) for t in tokens for p in range(len(t))])
    return Positions(
        lengths=lengths,
        grid=grid,
        row=row,
        key=flat,
        place=place,
        query_row=flat,
        query_start=None,
        query_weight=None,
        unit_weight=more.get("unit_weight"),
        unit_rows=more.get("unit_rows"),
        masked=0,
    )


def speak(tokens: list[list[int]], sounds: torch.Tensor, generator: torch.Generator):
    """Frames in which each token sounds for one to three frames, with noise -> [B, T, H], lengths, frame of token."""
    where, frames = [], []
    for utterance in tokens:
        at, rows = [], []
        for token in utterance:
            count = int(torch.randint(1, 4, (), generator=generator))
            at.append(range(len(rows), len(rows) + count))
            rows += [sounds[token]] * count
        where.append(at)
        frames.append(torch.stack(rows))
    lengths = torch.tensor([len(f) for f in frames])
    encoder = nn.utils.rnn.pad_sequence(frames, batch_first=True)
    encoder = encoder + 0.1 * torch.randn(encoder.shape, generator=generator)
    return encoder, lengths, where


def attention_weights(aligner: Attention, encoder, lengths, positions) -> torch.Tensor:
    """Return the weight of each frame for each position, averaged over heads: [M, T]."""
    key, _, mask = aligner.frames(encoder, lengths)
    query = aligner._query(positions, "t").view(-1, aligner.heads, 1, aligner.dim // aligner.heads)
    of = positions.row // positions.grid
    scores = (query * key[of]).sum(-1) / math.sqrt(query.shape[-1])  # (M, heads, T)
    return scores.masked_fill(~mask[of, :, 0], float("-inf")).softmax(-1).mean(1)


def test_attention_finds_a_planted_alignment_from_the_targets_alone():
    generator = torch.manual_seed(0)
    vocabulary, width = 12, 16
    sounds = torch.randn(vocabulary, width, generator=generator)
    states = torch.randn(vocabulary, 8, generator=generator)  # what the teacher holds of each token
    table = torch.randn(vocabulary, 10, generator=generator)
    aligner = Attention(width, {"t": table}, heads=1)
    head = nn.Linear(aligner.width, 8)
    optimiser = torch.optim.Adam([*aligner.parameters(), *head.parameters()], lr=3e-3)

    def batch(size):
        tokens = [
            torch.randint(vocabulary, (int(torch.randint(3, 9, (), generator=generator)),), generator=generator)
            for _ in range(size)
        ]
        tokens = [t.tolist() for t in tokens]
        return positions_of(tokens), *speak(tokens, sounds, generator)

    for _ in range(250):
        positions, encoder, lengths, _ = batch(12)
        encoder = encoder.masked_fill(torch.arange(encoder.shape[1])[:, None] >= lengths[:, None, None], 0)
        state, _ = aligner(aligner.frames(encoder, lengths), positions, "t")
        loss = (head(state) - states[positions.key]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    positions, encoder, lengths, where = batch(64)
    with torch.no_grad():
        weights = attention_weights(aligner, encoder, lengths, positions)
    planted = [frames for utterance in where for frames in utterance]
    inside = torch.stack([w[list(f)].sum() for w, f in zip(weights, planted)])
    # A token that occurs twice sounds in two places, so its planted frames need not have all of its weight.
    assert inside.mean() > 0.8
    assert weights.sum(-1).allclose(torch.ones(()))


def test_attention_leans_to_the_diagonal_before_it_has_learned():
    table = torch.randn(5, 8, generator=torch.manual_seed(3))
    torch.manual_seed(3)
    aligner = Attention(64, {"t": table}, heads=2)
    nn.init.zeros_(aligner.key.weight)
    nn.init.zeros_(aligner.query[0].weight)
    positions = positions_of([[1] * 10])
    weights = attention_weights(aligner, torch.zeros(1, 40, 64), torch.tensor([40]), positions)
    middle = (weights * (torch.arange(40) + 0.5)).sum(-1)
    assert (middle.diff() > 0).all() and middle[-1] - middle[0] > 20


def test_forward_and_weights_agree():
    generator = torch.manual_seed(4)
    aligner = Attention(12, {"t": torch.randn(6, 5, generator=generator)}, heads=1)
    positions = positions_of([[1, 2, 3], [4]])
    encoder, lengths = torch.randn(2, 7, 12, generator=generator), torch.tensor([7, 4])
    _, value, _ = aligner.frames(encoder, lengths)
    weights = attention_weights(aligner, encoder, lengths, positions)
    expected = torch.einsum("mt,mth->mh", weights, value[[0, 0, 0, 1], 0])
    state, rows = aligner(aligner.frames(encoder, lengths), positions, "t")
    torch.testing.assert_close(state, expected)
    assert rows is None


def test_the_text_never_enters_the_state():
    """If all frames are equal, all states are equal: nothing of the query enters them."""
    generator = torch.manual_seed(5)
    aligner = Attention(12, {"t": torch.randn(6, 5, generator=generator)}, heads=4)
    frame = torch.randn(12, generator=generator)
    encoder = frame.expand(2, 9, 12)
    state, _ = aligner(aligner.frames(encoder, torch.tensor([9, 5])), positions_of([[0, 1, 2], [3, 4, 5]]), "t")
    torch.testing.assert_close(state, state[:1].expand_as(state))


def test_words_ask_with_the_mean_of_their_tokens():
    table = torch.eye(4)
    aligner = Attention(8, {"t": table}, heads=1)
    words = positions_of([[0, 1]])
    pooled = Positions(
        **{
            **vars(words),
            "query_row": torch.tensor([0, 1, 2]),
            "query_start": torch.tensor([0, 2]),
            "query_weight": torch.tensor([0.5, 0.5, 1.0]),
        }
    )
    place = aligner.place(torch.zeros(2, 12)) * 0
    asked = aligner._query(pooled, "t") - aligner._query(words, "t") + place
    norm = torch.nn.functional.layer_norm
    mean, first = torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([1.0, 0, 0, 0])
    expected = aligner.query[0](norm(mean, (4,))) - aligner.query[0](norm(first, (4,)))
    torch.testing.assert_close(asked[0], expected)


def test_a_float16_table_is_not_saved_and_not_trained():
    aligner = Attention(8, {"t": torch.randn(4, 6).half()}, heads=2)
    assert not any("table" in name for name in aligner.state_dict())
    frames = aligner.frames(torch.randn(1, 3, 8), torch.tensor([3]))
    assert aligner(frames, positions_of([[1, 2]]), "t")[0].dtype == torch.float32


def test_a_width_that_heads_do_not_divide():
    with pytest.raises(ConfigError, match="not a multiple of its 4 heads"):
        Attention(10, {"t": torch.randn(4, 6)})


def test_occupancy_averages_the_frames_of_the_units_of_a_position():
    encoder = torch.arange(12.0).view(1, 4, 3)
    occupancy = torch.tensor([[[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1.0], [0, 0, 0, 0]]])
    # two positions: the first spans units 0 and 1 by a quarter and three quarters, the second has no unit
    unit_weight = torch.tensor([[[0.25, 0.75, 0], [0, 0, 0], [0, 0, 1.0]]])
    positions = positions_of([[0, 1, 2]], unit_weight=unit_weight, unit_rows=torch.tensor([0, 2]))
    aligner = Occupancy(3)
    state, rows = aligner(aligner.frames(encoder, occupancy), positions)
    first = 0.25 * encoder[0, 0] + 0.75 * (encoder[0, 1] + encoder[0, 2]) / 2
    torch.testing.assert_close(state, torch.stack([first, encoder[0, 3]]))
    assert rows.tolist() == [0, 2]
    with pytest.raises(ValueError, match="3 units in the spans, 2 in the model's output"):
        aligner(aligner.frames(encoder, occupancy[:, :2]), positions)
    with pytest.raises(ValueError, match="an occupancy of 3 frames for an encoder's 4"):
        aligner.frames(encoder, occupancy[..., :3])


def test_no_gradient_through_the_occupancy():
    occupancy = torch.rand(1, 2, 4, requires_grad=True)
    encoder = torch.randn(1, 4, 3, requires_grad=True)
    positions = positions_of([[0, 1]], unit_weight=torch.eye(2)[None], unit_rows=torch.tensor([0, 1]))
    aligner = Occupancy(3)
    state, _ = aligner(aligner.frames(encoder, occupancy), positions)
    state.sum().backward()
    assert occupancy.grad is None and encoder.grad.abs().sum() > 0
    assert not list(aligner.parameters())


def test_cif_weights_by_hand():
    """Shares 1/8, 3/8, 1/2 over two positions: sums 0.25, 1, 2, so the second frame ends the first position."""
    aligner = Cif(3)
    share = torch.tensor([[0.125, 0.5, 1.0, 1.0], [0.5, 1.0, 1.0, 1.0]])
    positions = positions_of([[0, 1], [2, 3, 4]])
    weights = aligner.weights(share, positions)
    torch.testing.assert_close(weights[0], torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]]))
    # three positions over two frames: the middle one takes half of each
    torch.testing.assert_close(weights[1], torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1.0, 0, 0]]))
    encoder = torch.arange(24.0).view(2, 4, 3)
    state, _ = aligner((encoder, share), positions)
    torch.testing.assert_close(state, torch.cat([weights[0, :2] @ encoder[0], weights[1] @ encoder[1]]))


def test_cif_weights_sum_to_one_and_never_go_back():
    generator = torch.manual_seed(7)
    aligner = Cif(8)
    lengths = torch.tensor([30, 17, 3])
    encoder = torch.randn(3, 30, 8, generator=generator) * (torch.arange(30) < lengths[:, None])[..., None]
    positions = positions_of([[1] * 11, [1] * 4, [1] * 9])  # more positions than frames in the last
    _, share = aligner.frames(encoder, lengths)
    weights = aligner.weights(share, positions)
    for b, n in enumerate((11, 4, 9)):
        torch.testing.assert_close(weights[b, :n].sum(1), torch.ones(n))
        assert weights[b, n:].abs().sum() == 0 and weights[b, :, lengths[b] :].abs().sum() < 1e-6
        middle = (weights[b, :n] * torch.arange(30)).sum(1)
        assert (middle.diff() >= 0).all()


def test_cif_learns_where_a_planted_token_begins():
    """One dimension marks the frame where a token sounds; the others of its frames are noise."""
    generator = torch.manual_seed(8)
    vocabulary, width = 10, 12
    sounds = torch.randn(vocabulary, width, generator=generator)
    sounds[:, 0] = 4.0
    states = torch.randn(vocabulary, 6, generator=generator)
    aligner, head = Cif(width, kernel=1), nn.Linear(width, 6)
    optimiser = torch.optim.Adam([*aligner.parameters(), *head.parameters()], lr=0.02)

    def batch(size):
        tokens, frames, planted = [], [], []
        for _ in range(size):
            count = int(torch.randint(2, 7, (), generator=generator))
            tokens.append(torch.randint(vocabulary, (count,), generator=generator).tolist())
            rows, at = [], []
            for token in tokens[-1]:
                quiet = int(torch.randint(0, 4, (), generator=generator))
                rows += [0.5 * torch.randn(width, generator=generator) for _ in range(quiet)]
                at.append(len(rows))
                rows.append(sounds[token])
            frames.append(torch.stack(rows))
            planted += at
        lengths = torch.tensor([len(f) for f in frames])
        return positions_of(tokens), nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths, planted

    for _ in range(200):
        positions, encoder, lengths, _ = batch(12)
        state, _ = aligner(aligner.frames(encoder, lengths), positions)
        loss = (head(state) - states[positions.key]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    positions, encoder, lengths, planted = batch(40)
    with torch.no_grad():
        weights = aligner.weights(aligner.frames(encoder, lengths)[1], positions).flatten(0, 1)[positions.row]
    assert weights[torch.arange(len(planted)), planted].mean() > 0.8


def test_the_predictor_before_and_after_a_unit():
    predictor = torch.arange(12.0).view(1, 4, 3)  # 4 states of 3 units
    unit_weight = torch.tensor([[[0.5, 0.5, 0], [0, 0, 1.0]]])
    positions = positions_of([[0, 1]], unit_weight=unit_weight, unit_rows=torch.tensor([0, 1]))
    for after, expected in ((True, [[4.5, 5.5, 6.5], [9, 10, 11]]), (False, [[1.5, 2.5, 3.5], [6, 7, 8]])):
        aligner = Predictor(3, after)
        state, rows = aligner(aligner.frames(predictor), positions)
        assert state.tolist() == expected and rows.tolist() == [0, 1]


def float64_plan(aligner: Transport, encoder, tokens: list[int]) -> np.ndarray:
    """The plan [T, P] of one utterance in float64 by a plain loop, until nothing changes."""

    def linear(layer, rows):
        rows = rows @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    table = aligner.table0.double().numpy()[tokens]
    table = (table - table.mean(1, keepdims=True)) / np.sqrt(table.var(1, keepdims=True) + 1e-5)
    key, query = linear(aligner.key, encoder.double().numpy()), linear(aligner.query[0], table)
    frames, positions = len(key), len(query)
    kernel = np.zeros((frames, positions))
    for t in range(frames):
        for p in range(positions):
            apart = ((t + 0.5) / frames - (p + 0.5) / positions) / aligner.spread
            kernel[t, p] = np.exp(-(1 - key[t] @ query[p]) / aligner.blur - apart**2 / 2)
    u, v, before = np.ones(frames), np.ones(positions), None
    while before is None or np.abs(u - before).max() > 1e-14 * np.abs(u).max():
        before = u
        u = (1 / frames / (kernel @ v)) ** (aligner.slack / (aligner.slack + aligner.blur))
        v = 1 / positions / (kernel.T @ u)
    return u[:, None] * kernel * v


def test_the_transport_plan_is_that_of_float64_and_the_minimum_of_its_objective():
    generator = torch.manual_seed(2)
    table = torch.randn(9, 10, generator=generator)
    aligner = Transport(16, {"t": table}, dim=12)
    tokens = [[1, 5, 2, 2, 8], [3], [4, 4, 0]]
    lengths = torch.tensor([40, 7, 23])
    encoder = torch.randn(3, 40, 16, generator=generator)
    encoder = encoder * (torch.arange(40) < lengths[:, None])[..., None]
    positions = positions_of(tokens)
    found = aligner.plan(aligner.frames(encoder, lengths), positions, "t").detach().double().numpy()
    for b, words in enumerate(tokens):
        count, n = int(lengths[b]), len(words)
        plan = float64_plan(aligner, encoder[b, :count], words)
        np.testing.assert_allclose(plan.sum(0), 1 / n, rtol=1e-12)
        np.testing.assert_allclose(found[b, :count, :n], plan * n, atol=2e-4)
        assert not found[b, count:, :n].any()
    # No other plan with the same sums over frames is better. Mass is moved between two frames of a position.
    count, n = 40, 5
    plan = float64_plan(aligner, encoder[0], tokens[0])
    key = torch.nn.functional.normalize(aligner.key(encoder[0]), dim=-1).detach().double().numpy()
    query = torch.nn.functional.normalize(aligner.projected(positions, "t")[:n], dim=-1).detach().double().numpy()
    cost = 1 - key @ query.T
    apart = ((np.arange(count)[:, None] + 0.5) / count - (np.arange(n) + 0.5) / n) / aligner.spread
    order = np.exp(-(apart**2) / 2)

    def objective(x: np.ndarray) -> float:
        rows = x.sum(1)
        blurred = (x * np.log(x / order) - x + order).sum()
        return (
            (x * cost).sum()
            + aligner.blur * blurred
            + aligner.slack * (rows * np.log(rows * count) - rows + 1 / count).sum()
        )

    rng = np.random.default_rng(0)
    tried = 0
    for _ in range(2000):
        t, other, p = rng.integers(count), rng.integers(count), rng.integers(n)
        if t != other and min(plan[t, p], plan[other, p]) > 1e-4:
            tried += 1
            moved, step = plan.copy(), 0.2 * min(plan[t, p], plan[other, p])
            moved[t, p], moved[other, p] = plan[t, p] + step, plan[other, p] - step
            assert objective(moved) > objective(plan)
    assert tried > 100


def test_transport_leaves_silence_out_and_finds_a_planted_alignment_from_the_targets_alone():
    generator = torch.manual_seed(0)
    vocabulary, width = 12, 16
    sounds = torch.randn(vocabulary, width, generator=generator)
    states, table = (torch.randn(vocabulary, n, generator=generator) for n in (8, 10))
    aligner = Transport(width, {"t": table})
    head = nn.Linear(width, 8)
    optimiser = torch.optim.Adam([*aligner.parameters(), *head.parameters()], lr=1e-2)

    def batch(size):
        tokens = [
            torch.randint(
                vocabulary, (int(torch.randint(3, 9, (), generator=generator)),), generator=generator
            ).tolist()
            for _ in range(size)
        ]
        encoder, lengths, where = speak(tokens, sounds, generator)
        silence = 0.1 * torch.randn(size, 6, width, generator=generator)  # before the first word
        return positions_of(tokens), torch.cat([silence, encoder], 1), lengths + 6, where

    for _ in range(300):
        positions, encoder, lengths, _ = batch(16)
        encoder = encoder.masked_fill((torch.arange(encoder.shape[1]) >= lengths[:, None])[..., None], 0)
        state, rows = aligner(aligner.frames(encoder, lengths), positions, "t")
        assert rows is None
        loss = (head(state) - states[positions.key]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    positions, encoder, lengths, where = batch(40)
    encoder = encoder.masked_fill((torch.arange(encoder.shape[1]) >= lengths[:, None])[..., None], 0)
    plan = aligner.plan(aligner.frames(encoder, lengths), positions, "t").detach()
    own = [
        float(plan[b, [6 + t for t in frames], p].sum())
        for b, words in enumerate(where)
        for p, frames in enumerate(words)
    ]
    assert sum(own) / len(own) > 0.7
    silent = float(plan[:, :6].sum()) / len(own)  # of the mass; its share of the frames is larger
    assert silent < 0.2 < 6 * 40 / float(lengths.sum())


def test_padding_and_company_change_nothing_in_transport_and_an_utterance_without_positions_gives_no_nan():
    generator = torch.manual_seed(3)
    aligner = Transport(8, {"t": torch.randn(6, 5, generator=generator)})
    encoder, lengths = torch.randn(3, 20, 8, generator=generator), torch.tensor([20, 11, 6])
    encoder = encoder * (torch.arange(20) < lengths[:, None])[..., None]
    tokens = [[0, 1, 2, 3], [4, 5], []]
    state, _ = aligner(aligner.frames(encoder, lengths), positions_of(tokens), "t")
    state.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in aligner.parameters())
    alone, _ = aligner(aligner.frames(encoder[1:2, :11], lengths[1:2]), positions_of(tokens[1:2]), "t")
    torch.testing.assert_close(alone, state[4:], rtol=1e-5, atol=1e-6)
