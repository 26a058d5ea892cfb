"""The views that a run reads: view patterns, each applied to all of its stores.

Guarantees: the meaning of a pattern does not depend on the order of the stores. An address means one view.
Try: `pytest tests/distill/test_sources.py`, or `stillhouse train CONFIG --set 'transfer.stores=["a", "b"]'`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.errors import ConfigError, NoStoreError
from ..extract.store import Store, View


def resolve_views(stores: Sequence[Store], patterns: Sequence[str]) -> list[tuple[Store, list[View]]]:
    """Return the `sources` of a TargetReader: each store with its views that match a pattern, in the patterns' order.

    Raises:
        NoStoreError: a pattern matches in none of the stores. The text lists the views that exist.
        ConfigError: two stores hold views of one address.
    """
    matches: list[list[View]] = [[] for _ in stores]
    for pattern in patterns:
        failures = []
        for views, store in zip(matches, stores, strict=True):
            try:
                views += store.resolve(pattern)
            except NoStoreError as e:
                failures.append(e)
        if len(failures) == len(stores):
            if len(failures) == 1:
                raise failures[0]
            listed = "; ".join(
                f"{store.address}: {', '.join(v.address for v in store.views) or 'none is complete'}"
                for store in stores
            )
            raise NoStoreError(f"no view matches {pattern!r}; there are: {listed}")
    holders: dict[str, Store] = {}
    for store, views in zip(stores, matches, strict=True):
        for address in dict.fromkeys(view.address for view in views):
            if address in holders:
                raise ConfigError(
                    f"{holders[address].address} and {store.address} both hold {address}",
                    expected="one view for each address",
                    remedy="leave one of the stores out, or extract one of the teachers under another --name",
                )
            holders[address] = store
    return [(store, list(dict.fromkeys(views))) for store, views in zip(stores, matches, strict=True) if views]
