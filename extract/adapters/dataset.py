"""A store as a map-style `torch.utils.data.Dataset`. This module imports torch; the store does not.

Guarantees: item i is utterance ids[i] in every process. A batch is one call of `Store.gather`.
Try: `pytest tests/extract/adapters/test_adapters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..store import Store, View
from ..store.batches import available_ids, require_one_text


class States(Dataset):
    """Items {"id", "states": {address: float32 [N, D]}, "token_id": {teacher: [N]}, "span": {teacher: [N, 2]}}.

    Speech teachers have no token_id and span.

    Use `collate` as the collate_fn of a DataLoader.

    Arguments:
        views: the views to read.
        ids: the utterances. None: all that have states in every view, from one text.

    Raises:
        StaleError: teachers have other texts of an utterance, because one of them has not been refreshed.
        NoStoreError: a teacher does not have an utterance.
    """

    def __init__(self, store: Store, views: Sequence[View], ids: Sequence[str] | None = None) -> None:
        self.store, self.views = store, list(dict.fromkeys(views))
        self.ids = available_ids(store, self.views) if ids is None else list(require_one_text(store, ids, self.views))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return a batch with one read. A DataLoader calls this method if there is one."""
        ids = [self.ids[i] for i in indices]
        batch = self.store.gather(ids, self.views, dtype="float32")
        ends = {teacher: np.cumsum(length).tolist() for teacher, length in batch.lengths.items()}
        items = []
        for i, utterance in enumerate(ids):
            cut = {t: slice(end[i - 1] if i else 0, end[i]) for t, end in ends.items()}
            items.append(
                {
                    "id": utterance,
                    "states": {v.address: torch.from_numpy(x[cut[v.teacher]]) for v, x in batch.states.items()},
                    "token_id": {t: torch.from_numpy(x[cut[t]]) for t, x in batch.token_id.items()},
                    "span": {t: torch.from_numpy(x[cut[t]]) for t, x in batch.span.items()},
                }
            )
        return items

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch, padded with zeros (spans with -1).

        Returns:
            {"id": ids, "lengths": {teacher: int64 [B]}, "states": {address: float32 [B, N, D]},
            "token_id": {teacher: [B, N]}, "span": {teacher: [B, N, 2]}}.
        """

        def padded(key: str, name: str, value: float) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([i[key][name] for i in items], True, value)

        first = items[0]
        return {
            "id": [i["id"] for i in items],
            "lengths": {a.split("/")[0]: torch.tensor([len(i["states"][a]) for i in items]) for a in first["states"]},
            "states": {address: padded("states", address, 0.0) for address in first["states"]},
            "token_id": {t: padded("token_id", t, 0) for t in first["token_id"]},
            "span": {t: padded("span", t, -1) for t in first["span"]},
        }
