"""Utterances as an xarray Dataset with named dimensions.

Guarantees: the states are those of `Store.gather`, as float32. To open a whole store lazily, use xarray itself:
`xarray.open_zarr("corpus.zarr/data.zarr", group="minilm", consolidated=False)`.
Try: `pytest tests/extract/adapters/test_adapters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.errors import UsageError
from ..store import Store, View


def to_xarray(store: Store, ids: Sequence[str], views: Sequence[View]) -> Any:
    """Return the states of utterances: `hidden` [view, token, dimension], float32, with coordinates.

    A view has its address, context and layer. A token has its utterance, position, token_id, begin and end. Of a speech
    teacher the axis is `frame`, and a frame has its utterance, position and time in seconds.

    Arguments:
        views: views of one teacher, because teachers have different tokens.

    Raises:
        ImportError: xarray is not installed.
        NoStoreError, StoreError: as `Store.gather`.
        UsageError: the views belong to several teachers.
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
    length, record = batch.lengths[teacher], store.teacher(teacher)
    axis, begin = record.axis, np.repeat(np.cumsum(length) - length, length)
    position = np.arange(length.sum()) - begin
    if record.is_speech:
        own = {"time": (axis, record.offset_s + position / record.rate_hz)}
    else:
        span = batch.span[teacher]
        own = {"token_id": (axis, batch.token_id[teacher]), "begin": (axis, span[:, 0]), "end": (axis, span[:, 1])}
    return xarray.Dataset(
        {"hidden": (("view", axis, "dimension"), np.stack([batch.states[v] for v in chosen]))},
        coords={
            "view": [v.address for v in chosen],
            "context": ("view", [v.context for v in chosen]),
            "layer": ("view", [v.layer for v in chosen]),
            "utterance": (axis, np.repeat(np.asarray(ids, dtype=object), length)),
            "position": (axis, position),
            **own,
        },
        attrs={"teacher": teacher, "store": store.address},
    )
