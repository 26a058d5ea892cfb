"""Read records from JSON: a dataclass whose fields have their types, or an error that names the field.

Guarantees: what `as_record` returns needs no further check, whatever a damaged or foreign file holds.
Try: `pytest tests/extract/inspect/test_hostile_stores.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ....data.errors import StoreError

Kind = TypeVar("Kind")
MOST = 1 << 53  # larger than every number in a store's JSON


def as_record(kind: type[Kind], value: object, where: str | Path, **known: object) -> Kind:
    """Return a `kind` from a JSON object and `known` fields. Raises StoreError naming the file and a wrong field."""
    if not isinstance(value, Mapping):
        raise StoreError("damaged", where=where, expected=f"a JSON object for {kind.__name__}")
    types_of = _types(kind)  # type: ignore[arg-type]
    for name, found in value.items():
        if name not in types_of:
            raise StoreError(f"damaged: {kind.__name__} has no {str(name)!r:.60}", where=where)
        if name not in known and not matches_type(found, types_of[name]):
            raise StoreError(f"damaged: {name} is {found!r:.60}", where=where, expected=_word(types_of[name]))
    needed = {f.name for f in dataclasses.fields(kind) if _required(f)}  # type: ignore[arg-type]
    missing = sorted(needed - value.keys() - known.keys())
    if missing:
        raise StoreError(f"damaged: {kind.__name__} lacks {', '.join(missing)}", where=where)
    return kind(**{**value, **known})


def matches_type(value: object, wanted: Any) -> bool:
    """Return whether a JSON value is of a type such as `dict[str, list[int]]` or `str | None`.

    Integers are below 2^53; text has no half surrogates and no NUL.
    """
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(matches_type(value, w) for w in inner)
    if origin is list:
        return isinstance(value, list) and all(matches_type(v, inner[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            matches_type(k, inner[0]) and matches_type(v, inner[1]) for k, v in value.items()
        )
    if wanted is bool or wanted is type(None):
        return isinstance(value, wanted)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool) and -MOST < value < MOST
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is str:
        return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
    raise TypeError(f"no JSON for {wanted}")


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _word(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)
