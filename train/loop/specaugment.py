"""SpecAugment (Park et al. 2019, arXiv 1904.08779): set bands of frequencies and stretches of time to the mean.

Guarantees: masks lie inside each utterance and depend on the generator alone. torchaudio's SpecAugment masks padding
like speech, and gives every utterance of a batch the same masks.
Try: `pytest tests/train/loop/test_specaugment.py`.
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
    """Return a masked copy of features [B, T, bins], which are normalised so that 0 is the mean, with lengths [B].

    The other arguments are the settings of the section specaugment. If ranks share a batch, `part` is its whole size
    and the range of these utterances in it. Masks are drawn for the whole batch, so that they do not depend on the
    number of ranks.
    """
    batch, frames, bins = features.shape
    size, own = part or (batch, range(batch))
    masked = torch.zeros(batch, frames, bins, dtype=torch.bool, device=features.device)
    lengths_f = lengths.to("cpu", torch.float32)[:, None]

    def draw(count: int) -> Tensor:
        return torch.rand(size, count, generator=generator)[own.start : own.stop : own.step]

    def stretches(count: int, widest: Tensor, length: Tensor, axis: int) -> Tensor:
        """Bool [B, axis]: `count` stretches up to `widest` inside `length`."""
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
