"""The study's controls: targets that a teacher's knowledge cannot explain.

`shuffled`: each utterance gets the states of another one of equal length, own queries and spans kept: what
helps then is not what the states say. `static`: the teacher's input embeddings: an auxiliary task on the
words' identities.

Invariant: who gives to whom depends on the store and the seed alone, never on batches or on what is missing.
Exercised by: pytest tests/distill/test_controls.py; `stillhouse train CONFIG --set transfer.control=…`.
"""

from __future__ import annotations

import numpy as np

CONTROLS = ("shuffled", "static")
LEAST_STD = 1e-3  # as the store's norms


def donors(lengths: np.ndarray, seed: int) -> np.ndarray:
    """For each utterance (lengths int [U]) another one, int64 [U]: of equal length, or the next longer one.

    Utterances of equal length give in a ring. One whose length is its own takes from the next longer one,
    whose end is cut off. -1: the longest, if there is none other of its length. Utterances without tokens
    need nobody: themselves.
    """
    order = np.lexsort((np.random.default_rng(seed).random(len(lengths)), lengths))
    ordered = lengths[order]
    _, first, count = np.unique(ordered, return_index=True, return_counts=True)
    following = np.arange(1, len(lengths) + 1)
    ring = count > 1
    following[(first + count - 1)[ring]] = first[ring]
    found = np.full(len(lengths), -1, np.int64)
    inside = following < len(lengths)
    found[order[inside]] = order[following[inside]]
    return np.where(lengths == 0, np.arange(len(lengths)), found)


def table_norm(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of an embedding table [K, D] by dimension, over the vocabulary: float32 [D], std ≥
    1e-3.
    """
    table = table.astype(np.float32)
    return table.mean(0), np.maximum(table.std(0), LEAST_STD)
