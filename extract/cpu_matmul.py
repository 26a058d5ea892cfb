"""Compute matrix products by the library that is fast on this CPU. Everything else stays as it is.

Guarantees: float32 products stay float32 and differ only in the order of sums. In bfloat16, only the operands and
results of linear layers are rounded. The processor decides, and a measurement overrules it only if the difference is
clear. So equal machines write equal bytes, also while other programs run.
Try: `pytest tests/extract/test_cpu_matmul.py`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# How many times as fast a library must be measured to replace the one that the processor suggests. Measurements of
# equally fast ones differ by less, so that each process of a machine chooses the same.
CLEARLY = 1.3


class CpuMatmul(TorchFunctionMode):
    """Inside `with CpuMatmul(product)`, linear layers (GPT-2's call addmm) use `product`. Attention gets float32."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self._product = product

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and len(args) + len(kwargs) in (2, 3) and "weight" not in kwargs:
            return self._product(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"))
        if func is torch.addmm and len(args) == 3 and not kwargs and args[2].dim() == 2:
            return self._product(args[1], args[2].t(), args[0])
        if func is functional.scaled_dot_product_attention:
            args = tuple(_float32(a) for a in args)
            kwargs = {k: _float32(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def float32_products() -> CpuMatmul | None:
    """Return oneDNN's products, or None where those of torch's own choice are as fast."""
    return CpuMatmul(_onednn) if _has_onednn() and _is_onednn_faster() else None


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _is_onednn_faster() -> bool:
    """Whether to use oneDNN: on AMD processors with AVX-512, of which MKL uses half the width, unless it is slower."""
    suggested = torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"
    times_as_fast = _times_as_fast(functional.linear, _onednn)
    return times_as_fast > 1 / CLEARLY if suggested else times_as_fast > CLEARLY


def _times_as_fast(plain: Product, other: Product) -> float:
    """Return the time of `plain` over that of `other`, for the product of a usual layer. They take turns."""
    x, weight = torch.ones(512, 384), torch.ones(1024, 384)
    least = {}
    with torch.inference_mode():
        for turn in range(8):
            for product in (plain, other):
                began = time.perf_counter()
                product(x, weight, None)
                took = time.perf_counter() - began
                if turn:  # The first one sets things up.
                    least[product] = min(took, least.get(product, took))
    return least[plain] / least[other]


def bfloat16_products() -> CpuMatmul | None:
    """Return oneDNN's products, which cast and lay out each weight once, or None where they are not supported."""
    if not _has_onednn() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    # The parameter is kept with its layout, because the id of a deleted tensor could become another tensor's.
    laid_out: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        known = laid_out.get(id(weight))
        low = x.bfloat16()
        if known is None:
            cast = weight.bfloat16().contiguous(), None if bias is None else bias.bfloat16()
            if not isinstance(weight, torch.nn.Parameter):
                return functional.linear(low, *cast)
            known = weight, torch.ops.mkldnn._reorder_linear_weight(cast[0]), cast[1]
            laid_out[id(weight)] = known
        return torch.ops.mkldnn._linear_pointwise(low, known[1], known[2], "none", [], "")

    return CpuMatmul(product)


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
