"""SpecAugment: inside the utterance, within the shares, from the generator alone."""

from __future__ import annotations

import torch

from stillhouse.train.loop.specaugment import spec_augment

SETTINGS = {"frequency_masks": 2, "frequency_width": 10, "time_masks": 4, "time_width": 20, "time_share": 0.2}


def test_masks_stay_within_their_shares() -> None:
    features = torch.ones(64, 200, 40)
    lengths = torch.arange(64) * 3 + 9
    masked = spec_augment(features, lengths, torch.Generator().manual_seed(0), **SETTINGS) == 0
    whole_frames, whole_bins = masked.all(dim=2), masked.all(dim=1)
    assert whole_frames.any() and whole_bins.any()
    for b, length in enumerate(lengths.tolist()):
        assert not whole_frames[b, length:].any()
        assert whole_frames[b].sum() <= 0.2 * length
        assert whole_bins[b].sum() <= 20
    widths = {int(m.sum()) for m in whole_bins}
    assert len(widths) > 5  # utterances get masks of their own


def test_the_generator_decides() -> None:
    features, lengths = torch.randn(3, 50, 40), torch.tensor([50, 40, 30])
    first, again, other = (
        spec_augment(features, lengths, torch.Generator().manual_seed(seed), **SETTINGS) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_masks_change_nothing() -> None:
    features = torch.randn(2, 30, 40)
    none = {**SETTINGS, "frequency_masks": 0, "time_masks": 0}
    assert torch.equal(spec_augment(features, torch.tensor([30, 20]), torch.Generator(), **none), features)
