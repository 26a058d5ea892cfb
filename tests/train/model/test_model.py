"""The model: exact under padding, stepwise prediction equal to the parallel one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stillhouse.extract import cpu_matmul
from stillhouse.train.model import layers
from stillhouse.train.model.layers import ConvolutionModule, Subsampling, dropout
from stillhouse.train.model.transducer import LstmPredictor, StatelessPredictor, Transducer

ENCODER = {"bins": 80, "dim": 48, "layers": 2, "heads": 4, "inner": 96, "kernel": 7}


def model(**changes: object) -> Transducer:
    torch.manual_seed(0)
    encoder = {**ENCODER, **{k: v for k, v in changes.items() if k in {"subsampling", "layers"}}}
    built = Transducer(12, encoder, predictor_dim=32, joint_dim=24)
    built.encoder.feature_mean.copy_(torch.randn(80))
    built.encoder.feature_std.copy_(torch.rand(80) + 0.5)
    return built.eval()


@pytest.mark.parametrize("subsampling", [2, 3, 4, 6, 8])
def test_batch_gives_each_utterance_what_it_gets_alone(subsampling: int) -> None:
    net = model(subsampling=subsampling)
    lengths = torch.tensor([97, 64, 33, 8, 1])
    features = torch.randn(5, 120, 80) * 3
    with torch.no_grad():
        states, out = net.encode(features, lengths)
        for b, length in enumerate(lengths.tolist()):
            alone, n = net.encode(features[b : b + 1, :length], lengths[b : b + 1])
            assert n.item() == out[b].item() == -(-length // subsampling)
            assert net.encoder.output_lengths(lengths)[b] == n
            assert alone.shape[1] == n.item()
            torch.testing.assert_close(states[b, : n.item()], alone[0], atol=1e-5, rtol=0)
            assert (states[b, n.item() :] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 6, 8])
def test_the_middle_of_what_a_state_sees(factor: int, causal: bool) -> None:
    """By the gradients: state t has the frames around t * factor + shift in its convolutions, as many on each side."""
    torch.manual_seed(0)
    front = Subsampling(4, 16, factor, 0.0, causal).eval()
    features = torch.randn(1, 200, 4, requires_grad=True)
    states = front(features, torch.tensor([200]))[0]
    for state in (60 // factor, 61 // factor):
        [gradient] = torch.autograd.grad((states[0, state] * torch.randn(16)).sum(), features, retain_graph=True)
        seen = gradient[0].abs().sum(1).nonzero().flatten()
        assert (int(seen[0]) + int(seen[-1])) / 2 == state * factor + front.shift


def test_what_is_in_the_padding_does_not_matter() -> None:
    net = model()
    lengths = torch.tensor([50, 20])
    features = torch.randn(2, 50, 80)
    dirty = features.clone()
    dirty[1, 20:] = float("nan")
    with torch.no_grad():
        torch.testing.assert_close(net.encode(features, lengths)[0], net.encode(dirty, lengths)[0], rtol=0, atol=0)


def test_a_tap_is_the_output_of_that_block() -> None:
    net = model()
    features, lengths = torch.randn(2, 40, 80), torch.tensor([40, 30])
    states, _, taps = net.encoder(features, lengths, taps=(1, 2))
    assert set(taps) == {1, 2}
    torch.testing.assert_close(taps[2], states, rtol=0, atol=0)
    assert not torch.equal(taps[1], taps[2])


@pytest.mark.parametrize("kind", [StatelessPredictor, LstmPredictor])
def test_stepwise_prediction_equals_parallel(kind: type) -> None:
    torch.manual_seed(0)
    net = kind(9, 16).eval()
    targets = torch.randint(1, 9, (3, 6))
    whole = net(targets)
    state = net.initial(3, torch.device("cpu"))
    everywhere = torch.ones(3, dtype=torch.bool)
    for u in range(7):
        torch.testing.assert_close(net.step(state), whole[:, u])
        if u < 6:
            held = net.advance(state, targets[:, u], ~everywhere)
            torch.testing.assert_close(net.step(held), net.step(state))  # advanced nowhere: unchanged
            state = net.advance(state, targets[:, u], everywhere)


def test_bfloat16_on_the_cpu_ends_and_is_near() -> None:
    """Widths and lengths for which oneDNN's bfloat16 depthwise kernel is never found."""
    torch.manual_seed(0)
    module = ConvolutionModule(32, 15)
    x, mask = torch.randn(37, 54, 32), torch.ones(37, 54, 1)
    with torch.no_grad():
        exact, _ = module(x, mask)
        with torch.autocast("cpu", torch.bfloat16):
            near, _ = module(x, mask)
    torch.testing.assert_close(near.float(), exact, atol=0.05, rtol=0.05)


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    torch.manual_seed(0)
    x = torch.ones(999, 1001, requires_grad=True)
    y = dropout(x, 0.25, True)
    assert abs((y == 0).float().mean().item() - 0.25) < 0.002
    assert abs(y.mean().item() - 1) < 0.003
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())
    assert dropout(x, 0.25, False) is x
    columns = (dropout(torch.ones(4096, 64), 0.5, True) == 0).float().mean(0)
    assert columns.min() > 0.45 and columns.max() < 0.55  # no lane of the 64-bit words is biased


def test_an_lstm_on_the_cpu_trains_in_bfloat16() -> None:
    """In float32, which costs next to nothing: what it gives is what it gives without autocast."""
    torch.manual_seed(0)
    net, targets = LstmPredictor(9, 16), torch.randint(1, 9, (3, 7))
    expected = net(targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = net(targets)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert net.lstm.weight_hh_l0.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "chunk_frames": 16, "left_chunks": 2}, {"causal": True}], ids=str
)
def test_states_without_gradients_are_those_with_them(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    """The kernels of inference, over products large enough for them, in a batch and alone."""
    monkeypatch.setattr(cpu_matmul, "_is_onednn_faster", cpu_matmul._has_onednn)
    torch.manual_seed(0)
    net = Transducer(9, {"dim": 96, "layers": 2, "heads": 4, "inner": 384, "kernel": 15, **options}).eval()
    lengths = torch.tensor([1200, 1003, 3])
    features = torch.randn(3, 1200, 80)
    with torch.no_grad():
        found, _ = net.encode(features, lengths)
        alone, _ = net.encode(features[1:2, :1003], lengths[1:2])
    expected, _ = net.encode(features, lengths)
    assert expected.requires_grad
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone[0], expected[1, : alone.shape[1]].detach(), atol=1e-5, rtol=1e-5)
    laid_out = [module for module in net.modules() if module in cpu_matmul._laid_out]
    assert bool(laid_out) == cpu_matmul._has_onednn()


@pytest.mark.parametrize(("kernel", "padding"), [(5, 2), (5, 0), (1, 0), (4, 0)])
def test_gradients_of_the_depthwise_convolution(kernel: int, padding: int) -> None:
    """Those of conv1d, with and without padding, for all inputs and for the weight alone."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 9, 6), (6, 1, kernel), (6,))]
    for wanted in ((0, 1, 2), (1,), (0, 2)):
        found = []
        for ours in (True, False):
            x, weight, bias = (a.clone().requires_grad_(k in wanted) for k, a in enumerate(made))
            if ours:
                y = layers._Depthwise.apply(x, weight, bias, padding)
            else:
                y = F.conv1d(x.transpose(1, 2), weight, bias, padding=padding, groups=6).transpose(1, 2)
            (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
            found.append([y, *(a.grad for a in (x, weight, bias))])
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_training_uses_the_gradient_of_the_depthwise_convolution() -> None:
    module = layers.ConvolutionModule(8, 5)
    for training, name in ((True, "_DepthwiseBackward"), (False, "ConvolutionBackward")):
        nodes, seen = [module.train(training)(torch.randn(2, 7, 8), torch.ones(2, 7, 1))[0].grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None:
                seen.add(type(node).__name__)
                nodes += [following for following, _ in node.next_functions]
        assert any(n.startswith(name) for n in seen), seen
