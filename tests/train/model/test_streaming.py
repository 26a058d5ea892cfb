"""Streaming: chunk by chunk the encoder says what it says of the whole, and hears nothing behind a chunk's end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillhouse.data.errors import ConfigError
from stillhouse.train.model.streaming import EncoderStream
from stillhouse.train.model.transducer import Encoder

CPU = torch.device("cpu")


def encoder(**changes: object) -> Encoder:
    torch.manual_seed(0)
    settings = {"bins": 20, "dim": 32, "layers": 3, "heads": 4, "inner": 48, "kernel": 7, "causal": True}
    built = Encoder(**{**settings, "chunk_frames": 24, "left_chunks": 2, **changes})  # type: ignore[arg-type]
    built.feature_mean.copy_(torch.randn(20))
    built.feature_std.copy_(torch.rand(20) + 0.5)
    return built.eval()


@torch.no_grad()
def whole(net: Encoder, features: Tensor, lengths: Tensor) -> Tensor:
    return net(net.normalise(features, lengths), lengths)[0]


@torch.no_grad()
def in_chunks(net: Encoder, features: Tensor, lengths: Tensor, chunk: int, **state: int) -> Tensor:
    now, out = net.stream_state(len(features), **state), []
    shapes = {name: value.shape for name, value in now.items()}
    for start in range(0, features.shape[1], chunk):
        part = features[:, start : start + chunk]
        part = torch.nn.functional.pad(part, (0, 0, 0, chunk - part.shape[1]), value=float("nan"))
        states, now = net.stream(part, now, (lengths - start).clamp(0, chunk))
        assert {name: value.shape for name, value in now.items()} == shapes
        out.append(states)
    assert torch.equal(now["processed"], net.output_lengths(lengths))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(
    ("subsampling", "chunk", "left", "kernel", "layers"),
    [
        (4, 24, 2, 7, 3),
        (4, 4, 9, 15, 3),
        (2, 6, 1, 1, 2),
        (3, 12, 0, 5, 2),
        (6, 12, 3, 7, 2),
        (8, 16, 1, 31, 1),
        (4, 400, 1, 7, 2),
        (4, 8, 2, 7, 0),
    ],
)
def test_chunks_equal_the_whole_for_every_length_in_a_batch(
    subsampling: int, chunk: int, left: int, kernel: int, layers: int
) -> None:
    net = encoder(subsampling=subsampling, chunk_frames=chunk, left_chunks=left, kernel=kernel, layers=layers)
    lengths = torch.tensor([131, 96, 50, 7, 1])
    features = 3 * torch.randn(5, 131, 20)
    expected = whole(net, features, lengths)
    found = in_chunks(net, features, lengths, chunk)
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)
    assert (found[:, expected.shape[1] :] == 0).all()
    for b, length in enumerate(lengths.tolist()):
        alone = whole(net, features[b : b + 1, :length], lengths[b : b + 1])[0]
        torch.testing.assert_close(expected[b, : len(alone)], alone, atol=1e-5, rtol=0)


def test_one_model_streams_with_other_chunks_than_its_own() -> None:
    net = encoder(chunk_frames=0)
    lengths, features = torch.tensor([100, 61]), torch.randn(2, 100, 20)
    found = in_chunks(net, features, lengths, 16, chunk_frames=16, left_chunks=3)
    assert not torch.allclose(whole(net, features, lengths), found[:, :25], atol=1e-3)
    net.chunk_frames, net.left_chunks = 16, 3
    torch.testing.assert_close(found[:, :25], whole(net, features, lengths), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 101, [101], [24, 24, 24, 24, 5], [0, 7, 40, 3, 51], [100, 0, 1]])
def test_however_the_frames_arrive(pieces: list[int]) -> None:
    net = encoder()
    features = torch.randn(101, 20)
    stream, out = EncoderStream(net), []
    for part in features.split(pieces):
        out.append(stream.push(part))
    assert sum(map(len, out)) == 24  # 4 whole chunks of 6 states
    found = torch.cat([*out, stream.finish()])
    torch.testing.assert_close(found, whole(net, features[None], torch.tensor([101]))[0], atol=1e-5, rtol=0)
    again = torch.cat([stream.push(features), stream.finish()])  # a new utterance: nothing of the last one is left
    assert torch.equal(again, found)
    assert stream.finish().shape == (0, 32)


def test_an_utterance_may_take_the_place_of_one_that_ended() -> None:
    net = encoder()
    a, b = torch.randn(2, 60, 20), torch.randn(2, 48, 20)
    with torch.no_grad():
        state = net.stream_state(2)
        for start in (0, 24):
            _, state = net.stream(a[:, start : start + 24], state)
        for value in state.values():
            value[1] = 0
        found = []
        for start in (0, 24):
            states, state = net.stream(torch.stack([torch.zeros(24, 20), b[1, start : start + 24]]), state)
            found.append(states[1])
    torch.testing.assert_close(torch.cat(found), whole(net, b, torch.tensor([48, 48]))[1], atol=1e-5, rtol=0)


def test_nothing_behind_a_chunk_reaches_it_and_what_is_before_does() -> None:
    net = encoder()
    lengths = torch.tensor([120])
    features = torch.randn(1, 120, 20, requires_grad=True)
    states, direction = net(net.normalise(features, lengths), lengths)[0], torch.randn(32)
    for chunk in range(5):
        for state in (6 * chunk, 6 * chunk + 5):
            (gradient,) = torch.autograd.grad(states[0, state] @ direction, features, retain_graph=True)
            heard = gradient[0].abs().sum(1) > 0
            assert not heard[24 * (chunk + 1) :].any()
            assert heard[24 * chunk : 24 * (chunk + 1)].all()  # its own chunk to the end, whichever state of it
            if chunk:
                assert heard[24 * (chunk - 1) : 24 * chunk].all()


def test_causal_convolutions_alone_hear_nothing_later_than_the_state() -> None:
    net = encoder(layers=1)
    features, lengths = torch.randn(1, 40, 20, requires_grad=True), torch.tensor([40])
    x = net.front(features, lengths)[0]
    y, _ = net.blocks[0].convolution(x, torch.ones(1, 10, 1))
    for state in range(10):
        (gradient,) = torch.autograd.grad(y[0, state].sum(), features, retain_graph=True)
        heard = gradient[0].abs().sum(1) > 0
        assert heard[4 * state + 3] and not heard[4 * state + 4 :].any()


def test_half_a_minute_of_chunks_ends_where_the_whole_does() -> None:
    """Positions begin anew with every chunk: nothing drifts with time."""
    net = encoder(layers=2)
    features, lengths = torch.randn(1, 3000, 20), torch.tensor([3000])
    found, expected = in_chunks(net, features, lengths, 24), whole(net, features, lengths)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_bfloat16_chunks_are_near_the_whole() -> None:
    net = encoder()
    features, lengths = torch.randn(2, 96, 20), torch.tensor([96, 70])
    exact = whole(net, features, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        near = in_chunks(net, features, lengths, 24)
    torch.testing.assert_close(near.float(), exact, atol=0.1, rtol=0.1)


def test_the_gradient_is_finite_where_whole_chunks_are_padding() -> None:
    net = encoder(left_chunks=0).train()
    features, lengths = torch.randn(2, 200, 20), torch.tensor([200, 3])
    net(net.normalise(features, lengths), lengths)[0].square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)


def test_chunks_are_drawn_in_training_alone_and_by_the_seed() -> None:
    net = encoder(chunk_choices=[8, 48, 0], dropout=0.0)
    features, lengths = torch.randn(1, 96, 20), torch.tensor([96])

    def drawn(count: int = 24) -> list[Tensor]:
        torch.manual_seed(3)
        return [whole(net.train(), features, lengths) for _ in range(count)]

    first, again = drawn(), drawn()
    assert all(map(torch.equal, first, again))
    kinds = []
    for chunk in (8, 48, 0):
        net.eval().chunk_frames = chunk
        kinds.append(whole(net, features, lengths))
    which = [[torch.allclose(x, kind, atol=1e-5) for kind in kinds] for x in first]
    assert all(sum(row) == 1 for row in which) and all(any(column) for column in zip(*which))


def test_a_traced_chunk_is_the_same_function() -> None:
    net = encoder(layers=1)
    features, lengths = torch.randn(1, 72, 20), torch.tensor([72])

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            out, new = self.net.stream(x, dict(zip(names, values, strict=True)))
            return (out, *new.values())

    state = net.stream_state(1)
    names = list(state)
    exported = torch.export.export(Step().eval(), (features[:, :24], *state.values())).module()
    out, values = [], tuple(state.values())
    for start in (0, 24, 48):
        states, *values = exported(features[:, start : start + 24], *values)
        out.append(states)
    torch.testing.assert_close(torch.cat(out, 1), whole(net, features, lengths), atol=1e-5, rtol=0)


def test_what_cannot_stream_says_why() -> None:
    with pytest.raises(ConfigError, match="not trained to stream"):
        encoder(causal=False, chunk_frames=0).stream_state()
    with pytest.raises(ConfigError, match="chunk_frames = 10"):
        encoder().stream_state(chunk_frames=10)
    with pytest.raises(ConfigError, match="chunk_frames = 0"):
        encoder(chunk_frames=0).stream_state()
