"""A teacher that costs nothing: states out of a pool of random numbers, tokens by white space.

Invariant: it goes through the same plan, writer and commits as a real one. Run: `make bench-store`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.extract.teacher.contexts import Window
from stillhouse.extract.teacher.tokenizer import Tokens


class MadeUpTokeniser:
    prefix, suffix, leading_space, hash = [0], [1], False, "made up"

    def join_ids(self, join: str) -> list[int]:
        return []

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [str(i) for i in ids]

    def encode(self, texts: Sequence[str], transform: str) -> Tokens:
        lengths = np.array([len(t.split()) for t in texts], dtype=np.int32)
        ids = np.concatenate([np.array([int(w) for w in t.split()], dtype=np.int32) for t in texts])
        at = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
        return Tokens(ids, lengths, np.stack([at * 2, at * 2 + 1], axis=1))


class MadeUpTeacher:
    """What the extraction asks of a teacher."""

    kind, architecture, revision, source, device, dtype, window = (
        "encoder",
        "MadeUp",
        None,
        "made-up",
        "cpu",
        "float32",
        512,
    )

    about = ""

    def __init__(self, width: int, depth: int) -> None:
        self.width, self.depth, self.tokeniser = width, depth, MadeUpTokeniser()
        self._pool = torch.from_numpy(np.random.default_rng(0).normal(size=(1 << 21) + (1 << 16)).astype(np.float32))

    def clone_model(self) -> MadeUpTeacher:
        return self

    def weights_hash(self) -> str:
        return f"made up {self.width} {self.depth}"

    def layer_numbers(self, asked: Sequence[int]) -> list[int]:
        return sorted({k % (self.depth + 1) for k in asked})

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros((len(ids), self.width), dtype=np.float32)

    def states(self, windows: Sequence[Window], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        b, t = len(windows), max(len(w.ids) for w in windows)
        size = b * t * self.width
        first = int(windows[0].ids[1]) % (1 << 16)
        pool = self._pool
        if size > 1 << 21:
            pool = pool.repeat(-(-size // (1 << 21)))
        return {k: pool[(first + k) : (first + k) + size].reshape(b, t, self.width) for k in layers}


def made_up_corpus(utterances: int, mean: float = 38, seed: int = 0) -> Corpus:
    """Lengths as in LibriSpeech's train-clean-100 with a wordpiece vocabulary: 38 tokens on average, 86 at most."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.normal(mean, mean / 3, utterances), 2, 2.3 * mean).astype(int)
    texts = [" ".join(map(str, rng.integers(10, 20_000, n))) for n in lengths]
    return Corpus(
        Path("made-up.jsonl"),
        [Utterance(id=f"spk{i // 40}-{i:07d}", text=t, session=f"s{i // 40}") for i, t in enumerate(texts)],
    )
