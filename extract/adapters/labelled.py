"""Utterances as an xarray Dataset with named dimensions.

Invariant: float32 of what `Store.gather` returns, nothing else. The whole store opens without this too, lazily:
`xarray.open_zarr("corpus.zarr/data.zarr", group="minilm", consolidated=False)`.
Exercised by: pytest tests/extract/adapters/test_adapters.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.errors import UsageError
from ..store import Store, View


def to_xarray(store: Store, ids: Sequence[str], views: Sequence[View]) -> Any:
    """States of utterances: `hidden` [view, token, dimension], with coordinates.

    view: its address, context and layer; token: its utterance, position in it, token_id, and begin and end of its
    span. One teacher at a time, since each has tokens of its own. Errors: as Store.gather; UsageError for views of
    several teachers; ImportError without xarray.
    """
    try:
        import xarray
    except ImportError as e:
        raise ImportError("to_xarray needs xarray: pip install 'stillhouse[xarray]'") from e

    teachers = {v.teacher for v in views}
    if len(teachers) != 1:
        raise UsageError(f"views of {', '.join(sorted(teachers)) or 'no teacher'}", expected="views of one teacher")
    (teacher,) = teachers
    chosen = list(dict.fromkeys(views))
    batch = store.gather(ids, chosen, dtype="float32")
    length, span = batch.lengths[teacher], batch.span[teacher]
    begin = np.repeat(np.cumsum(length) - length, length)
    return xarray.Dataset(
        {"hidden": (("view", "token", "dimension"), np.stack([batch.states[v] for v in chosen]))},
        coords={
            "view": [v.address for v in chosen],
            "context": ("view", [v.context for v in chosen]),
            "layer": ("view", [v.layer for v in chosen]),
            "utterance": ("token", np.repeat(np.asarray(ids, dtype=object), length)),
            "position": ("token", np.arange(length.sum()) - begin),
            "token_id": ("token", batch.token_id[teacher]),
            "begin": ("token", span[:, 0]),
            "end": ("token", span[:, 1]),
        },
        attrs={"teacher": teacher, "store": store.address},
    )
