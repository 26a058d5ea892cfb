"""SpecAugment (Park et al. 2019, arXiv 1904.08779): bands of frequencies and stretches of time set to the mean.

Invariant: masks fall inside each utterance and depend on the generator alone. Exercised by `stillhouse train`.
torchaudio's SpecAugment masks a batch's padding as if it were speech and gives every utterance the same masks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spec_augment(
    features: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    *,
    frequency_masks: int,
    frequency_width: int,
    time_masks: int,
    time_width: int,
    time_share: float,
    part: tuple[int, range] | None = None,
) -> Tensor:
    """`features` [B, T, bins], normalised so that 0 is the mean; `lengths` [B] in frames. Returns a masked copy.

    Each utterance gets `frequency_masks` bands up to `frequency_width` bins and `time_masks` stretches up to
    `time_width` frames, together at most `time_share` of its length. `generator` lives on the CPU.

    `part`: these are the utterances `part[1]` of a batch of `part[0]`, shared out among ranks: masks are drawn for all
    of them, so that each utterance gets the same ones however many ranks there are.
    """
    batch, frames, bins = features.shape
    size, mine = part or (batch, range(batch))
    masked = torch.zeros(batch, frames, bins, dtype=torch.bool, device=features.device)
    lengths_f = lengths.to("cpu", torch.float32)[:, None]

    def draw(count: int) -> Tensor:
        return torch.rand(size, count, generator=generator)[mine.start : mine.stop : mine.step]

    def stretches(count: int, widest: Tensor, length: Tensor, axis: int) -> Tensor:
        """[B, axis] bool: `count` stretches of width below `widest` inside `length`."""
        width = (draw(count) * (widest + 1)).floor()
        begin = (draw(count) * (length - width + 1).clamp(min=0)).floor()
        at = torch.arange(axis)[None, None, :]
        return ((at >= begin[:, :, None]) & (at < (begin + width)[:, :, None])).any(1).to(features.device)

    if frequency_masks and frequency_width:
        wide = torch.full((batch, 1), float(min(frequency_width, bins)))
        masked |= stretches(frequency_masks, wide, torch.full((batch, 1), float(bins)), bins)[:, None, :]
    if time_masks and time_width:
        widest = torch.minimum(torch.tensor(float(time_width)), (lengths_f * time_share / time_masks).floor())
        masked |= stretches(time_masks, widest, lengths_f, frames)[:, :, None]
    return features.masked_fill(masked, 0.0)
