"""Run in numba's CUDA simulator by test_cuda.py: `NUMBA_ENABLE_CUDASIM=1 python cuda_simulated.py CASE`.

A block has 8 threads, every launch several blocks; races aren't seen by the simulator, so every case also runs with
one thread a block, and both must agree.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from numba import config

assert config.ENABLE_CUDASIM

from stillhouse.train.rnnt import rnnt_loss, rnnt_loss_joint  # noqa: E402
from stillhouse.train.rnnt.autograd import BoundLoss  # noqa: E402
from stillhouse.train.rnnt.checks import Options, check_band, check_batch  # noqa: E402
from stillhouse.train.rnnt.cuda import joint as cuda_joint  # noqa: E402
from stillhouse.train.rnnt.cuda import launch as cuda  # noqa: E402
from stillhouse.train.rnnt.reference import rnnt_reference, tdt_reference  # noqa: E402

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make(seed=0, B=3, T=5, U=4, V=7, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, U + 1, V, generator=g, dtype=torch.float64).mul(2).to(dtype)
    y = torch.randint(1, V, (B, U), generator=g)
    T_b, U_b = torch.randint(1, T + 1, (B,), generator=g), torch.randint(0, U + 1, (B,), generator=g)
    T_b[0], U_b[-1] = T, U
    return x, y, T_b, U_b


class shaped:
    """Launches use other blocks inside this context."""

    def __init__(self, lanes, at_once, threads, spread):
        self.shape = lanes, at_once, threads, spread

    def __enter__(self):
        self.init = cuda.Launcher.__init__
        outer = self

        def init(self, tensor):
            outer.init(self, tensor)
            self.lanes, self.at_once, self.threads, self.spread = outer.shape

        cuda.Launcher.__init__ = init

    def __exit__(self, *_):
        cuda.Launcher.__init__ = self.init


def loss(x, batch, padded, o, band=None):
    """Return costs and occupancy of the kernels, with blank 0."""
    return BoundLoss.apply(cuda.CudaLoss(x, batch, 0, padded, band, o, True), x)


def run(x, y, T, U, o, packed=False, band=None, width=None):
    """Return costs, gradient, occupancy and the costs' weights; lengths are checked on the CPU."""
    V = x.shape[-1]
    padded = None if packed else tuple(x.shape[1:3])
    batch = check_batch(y, T, U, 0, V)
    given = x.clone()
    if packed:
        given = torch.cat([given[b, :t, : u + 1].reshape(-1, V) for b, (t, u) in enumerate(zip(T, U))])
    given.requires_grad_()
    costs, occupancy = loss(given, batch, padded, o, band)
    weight = torch.linspace(-1, 2, len(T)).to(costs.dtype)
    costs.backward(weight)
    return costs.detach(), given.grad, occupancy, weight


def compare(x, y, T, U, o, packed=False):
    expected = rnnt_reference(
        x.double().numpy(), y, T, U, 0, o.clamp, o.fused, fastemit_lambda=o.fastemit, delay_penalty=o.delay
    )
    tolerance = TOLERANCE[x.dtype]
    outcomes = []
    for shape in ((4, 2, 8, 2), (1, 1, 1, 1), (8, 1, 3, 3)):
        with shaped(*shape):
            costs, grad, occupancy, weight = run(x, y, T, U, o, packed)
        gradient = torch.from_numpy(expected.gradient) * weight.double().view(-1, 1, 1, 1)
        if packed:
            V = x.shape[-1]
            gradient = torch.cat([gradient[b, :t, : u + 1].reshape(-1, V) for b, (t, u) in enumerate(zip(T, U))])
        np.testing.assert_allclose(costs, expected.costs, rtol=min(tolerance, 1e-5), atol=1e-5)
        np.testing.assert_allclose(grad.double(), gradient, atol=2 * tolerance)
        frames = occupancy.shape[2]
        np.testing.assert_allclose(occupancy, expected.occupancy[:, :, :frames], atol=1e-5)
        outcomes.append((costs, grad))
    for costs, grad in outcomes[1:]:
        torch.testing.assert_close(costs, outcomes[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, outcomes[0][1], rtol=1e-2, atol=tolerance)


def dtypes():
    for seed, dtype in enumerate(TOLERANCE):
        compare(*make(seed, dtype=dtype), Options(fastemit=0.1, delay=0.2))


def layouts():
    for inplace in (False, True):
        for packed in (False, True):
            compare(*make(5), Options(clamp=0.3, inplace=inplace), packed)
    x, *rest = make(6)
    compare(x.log_softmax(-1), *rest, Options(fused=False))


def shapes():
    for T, U, V in ((1, 0, 2), (1, 3, 5), (6, 0, 3), (2, 5, 9), (7, 2, 33)):
        compare(*make(T, T=T, U=U, V=V), Options())


def many_threads():
    """There are more units than threads of a block, so threads stride."""
    compare(*make(1, B=2, T=4, U=19, V=4), Options())


def extremes():
    x, y, T, U = make(2)
    compare(x * 1000, y, T, U, Options(eps=0))
    x[..., 0, 3] = -float("inf")
    y[y == 3] = 2
    compare(x, y, T, U, Options())
    x, y, T, U = make(3)
    U[1] = 2
    poisoned = x.clone()
    poisoned[1, 0, 0, 2] = float("nan")
    poisoned[1, T[1] :] = float("nan")
    clean, found = run(x, y, T, U, Options()), run(poisoned, y, T, U, Options())
    assert torch.isnan(found[0]).tolist() == [False, True, False]
    for k in (0, 1):
        assert torch.equal(clean[k][[0, 2]], found[k][[0, 2]])
    x[1, :, :, y[1, 0]] = -float("inf")
    costs, grad, *_ = run(x, y, T, U, Options())
    assert torch.isinf(costs).tolist() == [False, True, False] and grad[1].eq(0).all()


def joint_parts(x, dtype, H=6):
    g = torch.Generator().manual_seed(0)
    B, T, U1, V = x.shape
    shapes_ = ((B, T, H), (B, U1, H), (V, H), (V,))
    return [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes_]


def joint_loss(parts, batch, padded, o, band=None, longest=None):
    computation = cuda_joint.CudaJointLoss(parts[0], parts[2], batch, 0, padded, band, o, True)
    computation.longest = longest
    return BoundLoss.apply(computation, *parts)


def joint():
    x, y, T, U = make(4)
    for relu in (False, True):
        for mul in (False, True):
            parts = joint_parts(x, torch.float32)
            expected = rnnt_loss_joint(
                *parts, y, T, U, 0, 0.3, "sum", eps=0, activation="relu" if relu else "tanh",
                combine="mul" if mul else "add", fastemit_lambda=0.1,
            )  # fmt: skip
            gradients = torch.autograd.grad(expected, parts)
            for elements, longest in ((1, None), (70, T.tolist()), (1 << 24, None)):
                cuda_joint.TILE_ELEMENTS = elements
                o = Options(clamp=0.3, fastemit=0.1, relu=relu, multiply=mul)
                costs, _ = joint_loss(parts, (y, T, U), tuple(x.shape[1:3]), o, longest=longest)
                torch.testing.assert_close(costs.sum(), expected)
                for a, b in zip(torch.autograd.grad(costs.sum(), parts), gradients):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def pruned():
    x, y, T, U = make(7, T=6, U=4)
    T[:] = torch.tensor([6, 5, 6])
    U[:] = torch.tensor([4, 2, 3])
    ranges = torch.tensor([0, 0, 1, 1, 2, 2])[None, :, None].expand(3, -1, -1) + torch.arange(3)
    batch = check_batch(y, T, U, 0, 7)
    band, _ = check_band(ranges, batch, 6)
    rows = x[:, :, :3].contiguous()
    a, b = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    expected = rnnt_loss(a, y, T, U, 0, reduction="none", ranges=ranges)
    costs, _ = loss(b, batch, (6, 3), Options(), band)
    expected.sum().backward()
    costs.sum().backward()
    torch.testing.assert_close(costs, expected)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    parts = joint_parts(x, torch.float32)
    expected = rnnt_loss_joint(*parts, y, T, U, 0, reduction="sum", ranges=ranges, eps=0)
    costs, _ = joint_loss(parts, (y, T, U), (6, 3), Options(), band)
    torch.testing.assert_close(costs.sum(), expected)
    for a, b in zip(torch.autograd.grad(costs.sum(), parts), torch.autograd.grad(expected, parts)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def tdt():
    for durations in ((0, 1, 2), (1,), (2, 0, 4, 1)):
        x, y, T, U = make(8)
        z = torch.randn(*x.shape[:3], len(durations), generator=torch.Generator().manual_seed(1))
        expected = tdt_reference(x, z, y, T, U, 0, durations, 0.05, 0.2, 0.1)
        x.requires_grad_(), z.requires_grad_()
        o = Options(fastemit=0.2, delay=0.1, sigma=0.05, durations=durations)
        batch = check_batch(y, T, U, 0, x.shape[3])
        costs, occupancy = BoundLoss.apply(cuda.CudaTdtLoss(x, batch, 0, tuple(x.shape[1:3]), None, o, True), x, z)
        costs.sum().backward()
        np.testing.assert_allclose(costs.detach(), expected.costs, rtol=1e-5)
        np.testing.assert_allclose(x.grad, expected.gradient, atol=1e-5)
        np.testing.assert_allclose(z.grad, expected.duration_gradient, atol=1e-5)
        np.testing.assert_allclose(occupancy, expected.occupancy, atol=1e-5)


def device_lengths():
    """Integers that are not checked are clamped, so no kernel leaves an array."""
    x, y, T, U = make(9)
    expected = run(x, y, T, U, Options())[0]
    costs, _ = loss(x, (y.int(), T.int(), U.int()), (5, 5), Options())
    torch.testing.assert_close(costs, expected)
    wild = (torch.full_like(y, 10**6), torch.tensor([99, -5, 3]), torch.tensor([-1, 50, 2]))
    costs, _ = loss(x.requires_grad_(), wild, (5, 5), Options())
    costs.sum().backward()
    assert torch.isfinite(x.grad).all()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print("ok")
