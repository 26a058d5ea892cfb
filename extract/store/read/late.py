"""Arrays of a batch that are made when they are first looked at: a batch's tokens cost as much as its states.

Guarantees: whatever is made has been found before, so looking at it reads no file and raises no error of a store.
Try: `pytest tests/extract/store/test_reader.py -k tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np


class LateArrays(Mapping[str, np.ndarray]):
    """Arrays by name out of `makers`, {name: function that returns the array}. Pickling makes all of them."""

    def __init__(self) -> None:
        self.makers: dict[str, Callable[[], np.ndarray]] = {}
        self._made: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._made:
            self._made[name] = self.makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)

    def __contains__(self, name: object) -> bool:
        return name in self.makers

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple:
        return (dict, (dict(self),))
