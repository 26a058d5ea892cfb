"""The smallest kernels that are of use for the checks in card.py. Importing this needs numba's CUDA target."""

from __future__ import annotations

from typing import Any

from numba import cuda as _cuda
from numba import float32

cuda: Any = _cuda  # Its types are those of the host, not of a kernel.


@cuda.jit
def double(x):
    """Double the numbers x [R, C]. One thread for each."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < x.shape[0] * x.shape[1]:
        r = i // x.shape[1]
        x[r, i - r * x.shape[1]] *= 2


@cuda.jit
def block_sum(x, out):
    """Write the sum of x [C] to out [1], by one block of 8 threads in two rows."""
    parts = cuda.shared.array(8, float32)
    me = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    total = float32(0)
    for i in range(me, x.shape[0], 8):
        total += x[i]
    parts[me] = total
    step = 4
    while step > 0:
        cuda.syncthreads()
        if me < step:
            parts[me] += parts[me + step]
        step //= 2
    if me == 0:
        out[0] = parts[0]


def through(load, put):
    """Return a kernel that puts y [1, C] into out and loads x into y, one thread for each number."""

    @cuda.jit
    def kernel(x, y, out):
        i = cuda.threadIdx.x
        put(out, 0, i, y[0, i])
        y[0, i] = load(x, 0, i)

    return kernel
