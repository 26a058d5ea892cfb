"""Building blocks of the encoder that are exact under padding: what lies behind an utterance's end never reaches it.

Invariant: padding is zeroed before every convolution and masked in every attention, and nothing normalises over a
batch, so a batch gives each utterance what it gets alone (to float rounding). Exercised by `stillhouse train`;
held by tests/train/test_model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """[B] lengths -> [B, size] bool, True inside the utterance."""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout, with p rounded to 1/256 on the CPU.

    There torch draws one Mersenne number an element on one thread, which costs more than the matrix product whose
    output it drops; eight elements share one 64-bit number here (5x faster).
    """
    if not training or p <= 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    threshold = min(255, round(256 * p))
    count = x.numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.uint8)[:count].view(x.shape) >= threshold
    return x * keep.to(x.dtype).mul_(256 / (256 - threshold))


class Dropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


STRIDES = {2: (2,), 3: (3,), 4: (2, 2), 6: (2, 3), 8: (2, 2, 2)}


class Subsampling(nn.Module):
    """Strided convolutions over time: [B, T, bins] -> [B, ceil(T / factor), dim].

    One-dimensional convolutions (bins are channels): on a CPU a two-dimensional front end costs more than four
    Conformer blocks.
    """

    def __init__(self, bins: int, dim: int, factor: int, dropout_p: float) -> None:
        super().__init__()
        self.strides = STRIDES[factor]
        widths = [bins] + [dim] * len(self.strides)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, 2 * (s // 2) + 3, stride=s, padding=s // 2 + 1)
            for a, b, s in zip(widths[:-1], widths[1:], self.strides)
        )
        self.norm = nn.LayerNorm(dim)
        self.drop = Dropout(dropout_p)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        for stride, convolution in zip(self.strides, self.convolutions):
            x = x * length_mask(lengths, x.shape[1])[:, :, None]
            x = F.silu(convolution(x.transpose(1, 2)).transpose(1, 2))
            lengths = (lengths + stride - 1) // stride
        # The residual stream stays in float32 under autocast.
        return self.drop(self.norm(x.float())), lengths


def rotary(positions: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, head_dim / 2] of rotary embeddings (Su et al. 2021, base 10,000)."""
    frequency = 10_000 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions over [B, T, dim]; `bias` [B, 1, 1, T] masks the padding."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        batch, frames, dim = x.shape
        q, k, v = self.inputs(x).view(batch, frames, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        cosine, sine = positions[0].to(q.dtype), positions[1].to(q.dtype)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        if x.device.type == "cpu":
            # The fused CPU kernel is 2.7x slower than two products in bfloat16, and no faster in float32.
            weights = torch.softmax(q @ (k * q.shape[-1] ** -0.5).transpose(-1, -2) + bias.to(q.dtype), dim=-1)
            y = weights.to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.output(y.transpose(1, 2).reshape(batch, frames, dim))


class ConvolutionModule(nn.Module):
    """Pointwise, GLU, depthwise over time, LayerNorm (not BatchNorm: see the module's invariant), SiLU, pointwise."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(dim, 2 * dim)
        self.kernel = kernel
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = F.glu(self.inputs(x), dim=-1) * mask
        if x.device.type == "cpu":
            # In bfloat16 oneDNN (torch 2.14) searches its depthwise kernel without end for some shapes, and is no
            # faster where it finds one.
            x = x.to(self.depthwise.weight.dtype)
        # [B, T, D] seen as a channels-last image of height 1: no transposed copy, and 3x faster than conv1d on a CPU.
        image = x.transpose(1, 2).unsqueeze(2)
        with torch.autocast("cpu", enabled=False):
            y = F.conv2d(
                image,
                self.depthwise.weight.unsqueeze(2),
                self.depthwise.bias,
                padding=(0, self.kernel // 2),
                groups=self.depthwise.groups,
            )
        return self.output(F.silu(self.norm(y.squeeze(2).transpose(1, 2))))


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(dim, inner)
        self.output = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(self.inputs(x)))


class ConformerBlock(nn.Module):
    """Gulati et al. 2020 (arXiv 2005.08100), figure 1, with rotary positions and LayerNorm in the convolution."""

    def __init__(self, dim: int, heads: int, inner: int, kernel: int, dropout_p: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(5))
        self.first, self.second = FeedForward(dim, inner), FeedForward(dim, inner)
        self.attention = SelfAttention(dim, heads)
        self.convolution = ConvolutionModule(dim, kernel)
        self.drop = Dropout(dropout_p)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, D]; mask [B, T, 1] float, 1 inside; bias [B, 1, 1, T], -inf on padding."""
        x = x + 0.5 * self.drop(self.first(self.norms[0](x)))
        x = x + self.drop(self.attention(self.norms[1](x), bias, positions))
        x = x + self.drop(self.convolution(self.norms[2](x), mask))
        x = x + 0.5 * self.drop(self.second(self.norms[3](x)))
        return self.norms[4](x)
