"""Building blocks of the encoder, which are exact under padding.

Guarantees: an utterance gets the same states in a batch as alone (to float rounding). Padding is zeroed before every
convolution and masked in every attention, and nothing normalises over a batch. A causal block takes what lies before
its frames (`past`) and returns what the next frames need. Zeros are the beginning of an utterance.
Try: `pytest tests/train/model/test_model.py tests/train/model/test_streaming.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...extract.cpu_matmul import apply_linear, is_plain_inference

Past = tuple[Tensor, Tensor, Tensor]  # what a block keeps: keys, values [B, left, D], convolution [B, kernel - 1, D]


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """Return bool [B, size] of lengths [B], true inside the utterance."""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Apply F.dropout, with p rounded to 1/256 on the CPU.

    On the CPU, torch draws one Mersenne number for each element on one thread. That costs more than the matrix product
    whose output it drops. Here eight elements share one 64-bit number, which is 5 times as fast.
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
    """The function `dropout` as a module."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


STRIDES = {1: (1,), 2: (2,), 3: (3,), 4: (2, 2), 6: (2, 3), 8: (2, 2, 2)}


class Subsampling(nn.Module):
    """Strided convolutions over time: [B, T, bins] -> [B, ceil(T / factor), dim].

    The convolutions are one-dimensional, with bins as channels, because a two-dimensional front end costs more than
    four Conformer blocks on a CPU. A causal state t has seen frames up to (t + 1) * factor - 1, its last one.
    """

    def __init__(self, bins: int, dim: int, factor: int, dropout_p: float, causal: bool = False) -> None:
        super().__init__()
        self.strides, self.causal = STRIDES[factor], causal
        widths = [bins] + [dim] * len(self.strides)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(a, b, 2 * (s // 2) + 3, stride=s, padding=0 if causal else s // 2 + 1)
            for a, b, s in zip(widths[:-1], widths[1:], self.strides)
        )
        # The (frames, width) that each convolution sees before the frames of its first state
        self.past_shapes = [(2 * (s // 2) + 3 - s, a) for a, s in zip(widths[:-1], self.strides)]
        self.norm = nn.LayerNorm(dim)
        self.drop = Dropout(dropout_p)

    @property
    def shift(self) -> int:
        """The feature frame in the middle of what state 0 sees. It is before the utterance, if causal."""
        shift, factor = 0, 1
        for stride, (back, _) in zip(self.strides, self.past_shapes):
            half = stride // 2 + 1  # of the frames that a convolution spans, without the one in the middle
            shift += factor * (half - (back if self.causal else half))
            factor *= stride
        return shift

    def forward(
        self, x: Tensor, lengths: Tensor, past: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return states, their lengths and, if causal, the `past` of the next frames for each convolution.

        A causal x holds a multiple of `factor` frames, unless the utterance ends with it.
        """
        new_past = []
        for number, (stride, convolution) in enumerate(zip(self.strides, self.convolutions)):
            x = x * length_mask(lengths, x.shape[1])[:, :, None]
            if self.causal:
                frames, (back, width) = x.shape[1], self.past_shapes[number]
                before = x.new_zeros(x.shape[0], back, width) if past is None else past[number].to(x.dtype)
                x = torch.cat([before, x], dim=1)
                new_past.append(x[:, frames:])
                x = F.pad(x, (0, 0, 0, stride - 1))  # completes the frames of the last state
            x = F.silu(convolution(x.transpose(1, 2)).transpose(1, 2))
            lengths = (lengths + stride - 1) // stride
        # The residual stream stays in float32 under autocast.
        return self.drop(self.norm(x.float())), lengths, new_past


def rotary(positions: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [positions, head_dim / 2] of rotary embeddings (Su et al. 2021, base 10,000)."""
    frequency = 10_000 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the halves of x [..., positions, head_dim] by the angles of `rotary`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def chunk_mask(frames: int, chunk: int, left_chunks: int, device: torch.device) -> Tensor:
    """Return bool [frames, frames]: frame i sees frame j of its own chunk or of the `left_chunks` before it."""
    number = torch.arange(frames, device=device) // chunk
    behind = number[:, None] - number[None, :]
    return (behind >= 0) & (behind <= left_chunks)


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions over [B, T, dim]. `bias` [B, 1, 1 or T, keys] masks keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, bias: Tensor, positions: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return the output and the past of the next frames.

        `past` holds keys and values [B, left, dim] of the frames before x, and `positions` are those of all keys. Keys
        are kept before rotation. Scores depend on the distance of two frames alone, so that positions may start at 0
        with every chunk.
        """
        batch, frames, dim = x.shape
        q, k, v = (
            apply_linear(self.inputs, x).view(batch, frames, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        )
        new_past = None
        if past is not None:
            heads = (batch, past[0].shape[1], self.heads, dim // self.heads)
            k, v = (torch.cat([p.to(n.dtype).view(heads).transpose(1, 2), n], dim=2) for p, n in zip(past, (k, v)))
            kept = [n[:, :, frames:].transpose(1, 2).reshape(p.shape).to(p.dtype) for p, n in zip(past, (k, v))]
            new_past = (kept[0], kept[1])
        cosine, sine = positions[0].to(q.dtype), positions[1].to(q.dtype)
        left = k.shape[2] - frames
        q, k = rotate(q, cosine[left:], sine[left:]), rotate(k, cosine, sine)
        if x.device.type == "cpu" and not is_plain_inference(q):
            # With gradients, the fused kernel of a CPU is 2.7 times slower than two products in bfloat16, and no faster
            # in float32.
            weights = torch.softmax(q @ (k * q.shape[-1] ** -0.5).transpose(-1, -2) + bias.to(q.dtype), dim=-1)
            y = weights.to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return apply_linear(self.output, y.transpose(1, 2).reshape(batch, frames, dim)), new_past


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve each channel of x [B, T, D] over time with its row of `weight` [D, 1, K]."""
    # As a channels-last image of height 1, [B, T, D] needs no transposed copy, and is 3 times as fast as conv1d.
    image = x.transpose(1, 2).unsqueeze(2)
    y = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, padding), groups=weight.shape[0])
    return y.squeeze(2).transpose(1, 2)


class _Depthwise(torch.autograd.Function):
    """The function `depthwise` with a gradient for the CPU.

    oneDNN (torch 2.14) takes 16 ms for the weight's gradient of 1,500 frames, 256 channels and a kernel of 31, and its
    convolution 0.4 ms. One product and sum for each place of the kernel takes 2.6 ms.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return depthwise(x, weight, bias, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        size, padding, (of_x, of_weight, of_bias, _) = weight.shape[2], ctx.padding, ctx.needs_input_grad
        before = depthwise(grad, weight.flip(2), None, size - 1 - padding) if of_x else None
        sums = None
        if of_weight:
            padded, frames = F.pad(x, (0, 0, padding, padding)), grad.shape[1]
            places = [(padded[:, k : k + frames] * grad).sum(dim=(0, 1)) for k in range(size)]
            sums = torch.stack(places, dim=1).unsqueeze(1)
        return before, sums, grad.sum(dim=(0, 1)) if of_bias else None, None


class ConvolutionModule(nn.Module):
    """Pointwise, GLU, depthwise over time, LayerNorm, SiLU, pointwise.

    LayerNorm replaces BatchNorm, which would make utterances depend on their batch. If it is causal, the depthwise
    convolution spans the `kernel` frames that end with its own.
    """

    def __init__(self, dim: int, kernel: int, causal: bool = False) -> None:
        super().__init__()
        self.inputs = nn.Linear(dim, 2 * dim)
        self.kernel, self.causal = kernel, causal
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if causal, the past of the next frames. `past` [B, kernel - 1, dim] precedes x."""
        x = F.glu(apply_linear(self.inputs, x), dim=-1) * mask
        if x.device.type == "cpu":
            # In bfloat16, oneDNN (torch 2.14) never finds its depthwise kernel for some shapes, and is no faster
            # for others.
            x = x.to(self.depthwise.weight.dtype)
        new_past = None
        if self.causal:
            frames = x.shape[1]
            if past is None:
                x = F.pad(x, (0, 0, self.kernel - 1, 0))
            else:
                x = torch.cat([past.to(x.dtype), x], dim=1)
                new_past = x[:, frames:].to(past.dtype)
        convolve = _Depthwise.apply if self.training and x.device.type == "cpu" else depthwise
        with torch.autocast("cpu", enabled=False):
            y = convolve(x, self.depthwise.weight, self.depthwise.bias, 0 if self.causal else self.kernel // 2)
        return apply_linear(self.output, F.silu(self.norm(y))), new_past


class FeedForward(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(dim, inner)
        self.output = nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(self.output, apply_linear(self.inputs, x, "swish"))


class ConformerBlock(nn.Module):
    """Gulati et al. 2020 (arXiv 2005.08100), figure 1, with rotary positions and LayerNorm in the convolution."""

    def __init__(self, dim: int, heads: int, inner: int, kernel: int, dropout_p: float, causal: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(5))
        self.first, self.second = FeedForward(dim, inner), FeedForward(dim, inner)
        self.attention = SelfAttention(dim, heads)
        self.convolution = ConvolutionModule(dim, kernel, causal)
        self.drop = Dropout(dropout_p)

    def forward(
        self, x: Tensor, mask: Tensor, bias: Tensor, positions: tuple[Tensor, Tensor], past: Past | None = None
    ) -> tuple[Tensor, Past | None]:
        """Return the output [B, T, D] and, for a causal block with a past, the past of the next frames.

        `mask` [B, T, 1] is 1 inside the utterance, and `bias` [B, 1, 1 or T, keys] is -inf on keys that are not seen.
        """
        x = torch.add(x, self.drop(self.first(self.norms[0](x))), alpha=0.5)
        attended, keys_values = self.attention(self.norms[1](x), bias, positions, past and past[:2])
        x = x + self.drop(attended)
        convolved, before = self.convolution(self.norms[2](x), mask, past and past[2])
        x = x + self.drop(convolved)
        x = self.norms[4](torch.add(x, self.drop(self.second(self.norms[3](x))), alpha=0.5))
        return x, None if keys_values is None or before is None else (*keys_values, before)
