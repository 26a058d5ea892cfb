"""Cut windows into batches of nearly equal length.

Guarantees: batches depend on the windows and two numbers of the plan, so any number of writers makes the same ones.
Try: `pytest tests/extract/teacher/test_windows.py`.
"""

from __future__ import annotations

import numpy as np

from .contexts import Window
from .passes import PADDED, Passes


def make_batches(
    windows: list[Window], most_tokens: int, overhead_tokens: int, passes: Passes = PADDED
) -> list[list[Window]]:
    """Cut the windows, longest first, into batches, by an exact dynamic programme over the sorted lengths.

    It minimises the padded tokens plus `overhead_tokens` a batch, which is the cost of a call counted in tokens. The
    windows are all with blocks or all without. A batch of several windows has at most `most_tokens` padded tokens.
    `passes` may demand windows of equal length, or one window a batch.
    """
    if passes.rows == "single":
        most_tokens = 1
    ranked = sorted(windows, key=lambda w: -w.size)
    lengths = np.array([w.size for w in ranked], dtype=np.int64)
    n = len(ranked)
    cost, cut = np.zeros((2, n + 1), dtype=np.int64)
    low = 0
    for i in range(1, n + 1):
        # A batch [j, i) costs its count times its longest, which is lengths[j].
        while low < i - 1 and (i - low) * lengths[low] > most_tokens:
            low += 1
        while passes.rows == "equal" and lengths[low] != lengths[i - 1]:
            low += 1
        j = np.arange(low, i)
        sizes = (i - j) * lengths[low:i]
        total = cost[low:i] + sizes + overhead_tokens
        total[(sizes > most_tokens) & (j < i - 1)] = np.iinfo(np.int64).max
        best = int(np.argmin(total))
        cost[i], cut[i] = total[best], low + best
    batches: list[list[Window]] = []
    i = n
    while i > 0:
        batches.append(ranked[cut[i] : i])
        i = int(cut[i])
    return batches[::-1]
