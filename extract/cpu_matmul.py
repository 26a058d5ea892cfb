"""Compute matrix products by the library that is fast on this CPU. Everything else stays as it is.

Guarantees: float32 products stay float32 and differ only in the order of sums. In bfloat16, only the operands and
results of linear layers are rounded. The processor decides, and a measurement overrules it only if the difference is
clear. So equal machines write equal bytes, also while other programs run.
Try: `pytest tests/extract/test_cpu_matmul.py`.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Activation = tuple[str, str]  # oneDNN's name of an activation and of its algorithm
Activated = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, str, str], torch.Tensor]
# How many times as fast a library must be measured to replace the one that the processor suggests. Measurements of
# equally fast ones differ by less, so that each process of a machine chooses the same.
CLEARLY = 1.3
# Float32 weights have a second copy in oneDNN's layout up to this size. Larger ones stay as they are.
MOST_LAID_OUT = 1 << 30
# Multiplications of a product with gradients below which torch's own choice is kept: oneDNN prepares each shape for 0.6
# ms, and batches have many shapes.
SMALLEST = 1 << 25
SMALLEST_IN_PIECES = 1 << 27  # To lay out a weight for both directions takes 0.8 ms.
SMALLEST_IN_INFERENCE = 1 << 23  # Each block of a model has the same shapes.


@dataclass(frozen=True, eq=False)
class _Call:
    """The last product, and the activation that it has applied already, or None."""

    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    output: torch.Tensor
    applied: Activation | None


class CpuMatmul(TorchFunctionMode):
    """Inside `with CpuMatmul(product)`, linear layers (GPT-2's call addmm) use `product`. Attention gets float32.

    Arguments:
        product: computes a linear layer.
        activated: computes a linear layer and the activation behind it at once. It is used for a weight whose output
            went straight into that activation before. If the next call is another one, the output is computed again.
    """

    def __init__(self, product: Product, activated: Activated | None = None) -> None:
        super().__init__()
        self._product, self._activated = product, activated
        # Weights are kept, because the id of a deleted tensor could become another tensor's.
        self._behind: dict[int, tuple[torch.Tensor, Activation | None]] = {}
        self._transposed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._thread = threading.local()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        last, self._thread.last = getattr(self._thread, "last", None), None
        if last is not None:
            activation = _activation(func, args, kwargs, last.output)
            if activation is not None and activation == last.applied:
                return last.output
            self._note(last, activation)
        if func is functional.linear and len(args) + len(kwargs) in (2, 3) and "weight" not in kwargs:
            return self._linear(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
        if func is torch.addmm and len(args) == 3 and not kwargs and args[2].dim() == 2:
            return self._linear(args[1], self._turned(args[2]), args[0])
        if func is functional.scaled_dot_product_attention:
            args = tuple(_float32(a) for a in args)
            kwargs = {k: _float32(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def __exit__(self, *exc: Any) -> None:
        last, self._thread.last = getattr(self._thread, "last", None), None
        if last is not None:
            self._note(last, None)
        super().__exit__(*exc)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        operands = x, weight, bias
        if self._activated is None or not isinstance(weight, torch.nn.Parameter) or weight.dtype != torch.float32:
            return self._product(*operands)
        _, activation = self._behind.get(id(weight), (weight, None))
        output = self._product(*operands) if activation is None else self._activated(*operands, *activation)
        self._thread.last = _Call(operands, output, activation)
        return output

    def _note(self, last: _Call, activation: Activation | None) -> None:
        """Learn what comes behind a weight, where it is always the same. Undo an activation that was not asked for."""
        weight = last.operands[1]
        if last.applied is not None:
            last.output.copy_(self._product(*last.operands))
            activation = None
        self._behind.setdefault(id(weight), (weight, activation))
        if self._behind[id(weight)][1] != activation:
            self._behind[id(weight)] = weight, None

    def _turned(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the transposed weight: for a parameter the same one at each call."""
        if not isinstance(weight, torch.nn.Parameter) or not torch.is_inference_mode_enabled():
            return weight.t()
        if id(weight) not in self._transposed:
            self._transposed[id(weight)] = weight, torch.nn.Parameter(weight.detach().t(), requires_grad=False)
        return self._transposed[id(weight)][1]


def _activation(func: Any, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> Activation | None:
    """Return what a call applies to `output`, if a product can apply it."""
    if len(args) != 1 or args[0] is not output:
        return None
    if func is functional.gelu and kwargs.keys() <= {"approximate"}:
        return "gelu", kwargs.get("approximate", "none")
    return ("swish", "") if func is functional.silu and not kwargs.get("inplace") else None


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def float32_products(fixed: bool = False) -> CpuMatmul | None:
    """Return oneDNN's products, which have gradients, or None where those of torch's own choice are as fast.

    `fixed`: the weights never change, so that each is laid out once. The bits are the same. There are no gradients.
    """
    if not _has_onednn() or not _is_onednn_faster():
        return None
    laid_out = _LaidOut(torch.float32, MOST_LAID_OUT)
    return CpuMatmul(laid_out, laid_out) if fixed else CpuMatmul(_onednn)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        if x.numel() * weight.shape[0] < SMALLEST:
            return functional.linear(x, weight, bias)
        return _WithGradients.apply(x, weight, bias)
    return _linear(x, weight, bias)


def is_plain_inference(x: torch.Tensor) -> bool:
    """Return whether x is float32 on the CPU and nothing records, traces or casts what becomes of it."""
    return (
        type(x) is torch.Tensor
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


# The weight of a layer, its version, and its layout for oneDNN. While the weight is kept, no other has its address.
_laid_out: WeakKeyDictionary[torch.nn.Linear, tuple[torch.Tensor, int, torch.Tensor]] = WeakKeyDictionary()


def apply_linear(layer: torch.nn.Linear, x: torch.Tensor, then: Literal["none", "swish"] = "none") -> torch.Tensor:
    """Return layer(x), for "swish" through SiLU. In inference, oneDNN does both in one pass where it is as fast.

    It then lays out the weight once, and again after the weight has changed.
    """
    weight = layer.weight
    if (
        not is_plain_inference(x)
        or x.numel() * layer.out_features < SMALLEST_IN_INFERENCE
        or weight.dtype is not torch.float32
        or weight.is_inference()
        or not (_has_onednn() and _is_onednn_faster())
    ):
        y = layer(x)
        return functional.silu(y) if then == "swish" else y
    known = _laid_out.get(layer)
    if known is None or known[0].data_ptr() != weight.data_ptr() or known[1] != weight._version:
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        known = _laid_out[layer] = weight.detach(), weight._version, laid_out
    return torch.ops.mkldnn._linear_pointwise(x, known[2], layer.bias, then, [], "")


class _WithGradients(torch.autograd.Function):
    """A linear layer whose three products in the backward pass are oneDNN's, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, weight.shape[0])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _linear(rows, weight.t()).view(x.shape) if of_x else None,
            _rows_product(rows, x.reshape(-1, weight.shape[1])) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _rows_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a.t() @ b [A, B] of a [N, A] and b [N, B]. oneDNN's first operand is copied, so it is the narrower one."""
    if a.shape[1] <= b.shape[1]:
        return _linear(a.t(), b.t())
    return _linear(b.t(), a.t()).t()


class ManyPieces:
    """The products of one linear layer, applied to one piece of its input after another. It has no autograd.

    The weight [V, H] is laid out once, for the library that is fast. Bias [V] and pieces have the weight's dtype.
    A piece of other than `rows` rows uses torch's own choice, because oneDNN prepares each shape for 0.6 ms. So do all
    pieces if their `total` of rows is small.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rows: int, total: int) -> None:
        self.weight, self.bias = weight, bias
        pays = weight.dtype == torch.float32 and total * weight.numel() >= SMALLEST_IN_PIECES
        self.rows = rows if pays and _has_onednn() and _is_onednn_faster() else 0
        self._transposed = weight.t().contiguous()  # A packed product takes a fifth less, in either library.
        if self.rows:
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self._packed, self._packed_back = reorder(weight.contiguous()), reorder(self._transposed)

    def outputs(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.t() + bias [N, V] of x [N, H], in `out` or in new memory."""
        if len(x) == self.rows:
            return _linear(x, self._packed, self.bias)
        return torch.addmm(self.bias, x, self._transposed, out=out)

    def grad_inputs(self, grad: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return grad @ weight [N, H] of grad [N, V], in `out` or in new memory."""
        return _linear(grad, self._packed_back) if len(grad) == self.rows else torch.mm(grad, self.weight, out=out)

    def add_grad_weight(self, grad: torch.Tensor, x: torch.Tensor, total: torch.Tensor) -> None:
        """Add grad.t() @ x to `total` [V, H]."""
        if len(x) == self.rows:
            total += _rows_product(grad, x)
        else:
            total.addmm_(grad.t(), x)


@functools.cache
def _is_onednn_faster() -> bool:
    """Whether to use oneDNN: on AMD processors with AVX-512, of which MKL uses half the width, unless it is slower."""
    suggested = torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"
    least = 1 / CLEARLY if suggested else CLEARLY
    # A disturbance must not overrule the processor, so that it takes three measurements.
    contradicted = all((_times_as_fast(functional.linear, _linear) > least) != suggested for _ in range(3))
    return suggested != contradicted


def _times_as_fast(plain: Product, other: Product) -> float:
    """Return the CPU time of `plain` over that of `other`, for the product of a usual layer. They take turns."""
    x, weight = torch.ones(512, 384), torch.ones(1024, 384)
    least: dict[Product, float] = {}
    with torch.inference_mode():
        for turn in range(12):
            for product in (plain, other):
                began = time.process_time()
                product(x, weight, None)
                took = time.process_time() - began
                if turn:  # The first one sets things up.
                    least[product] = min(took, least.get(product, took))
    return least[plain] / least[other]


def bfloat16_products() -> CpuMatmul | None:
    """Return oneDNN's products, which cast and lay out each weight once, or None where they are not supported."""
    if not _has_onednn() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    laid_out = _LaidOut(torch.bfloat16)
    return CpuMatmul(laid_out, laid_out)


class _LaidOut:
    """oneDNN's products in one dtype. A parameter is cast and laid out at its first use, so it must never change."""

    def __init__(self, dtype: torch.dtype, most_bytes: float = math.inf) -> None:
        self._dtype, self._left = dtype, most_bytes
        # The parameter is kept, because the id of a deleted tensor could become another tensor's.
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str = "none",
        algorithm: str = "",
    ) -> torch.Tensor:
        if self._dtype == torch.float32 and (x.dtype != torch.float32 or weight.dtype != torch.float32):
            return functional.linear(x, weight, bias)
        known = self._known.get(id(weight))
        if known is None:
            cast = weight.to(self._dtype).contiguous(), None if bias is None else bias.to(self._dtype)
            if not isinstance(weight, torch.nn.Parameter):
                return functional.linear(x.to(self._dtype), *cast)
            self._left -= cast[0].nbytes
            packed = torch.ops.mkldnn._reorder_linear_weight(cast[0]) if self._left >= 0 else cast[0]
            known = self._known[id(weight)] = weight, packed, cast[1]
        return torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), *known[1:], activation, [], algorithm)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _vendor() -> str:
    """The processor's maker in /proc/cpuinfo, or "" where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("vendor_id")), "")
