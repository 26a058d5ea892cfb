"""Files in blocks are the files as a whole, at any rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from stillhouse.data.audio import blocks
from stillhouse.data.audio.read import read_audio


@pytest.mark.parametrize("own_hz", [8_000, 16_000, 22_050, 44_100, 48_000, 11_025])
@pytest.mark.parametrize("seconds", [0.03, 1.0, 3.7137])
def test_blocks_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_hz: int, seconds: float) -> None:
    monkeypatch.setattr(blocks, "BLOCK_S", 0.5)
    samples = np.random.default_rng(own_hz).normal(0, 0.1, (int(seconds * own_hz), 2))
    soundfile.write(tmp_path / "a.wav", samples, own_hz, subtype="FLOAT")
    found = list(blocks.read_blocks(tmp_path / "a.wav", 16_000))
    assert max(map(len, found)) <= 0.6 * 16_000
    np.testing.assert_allclose(np.concatenate(found), read_audio(tmp_path / "a.wav"), atol=2e-6)
