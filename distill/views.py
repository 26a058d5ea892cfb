"""Which views of which stores a run reads: view patterns, each taken over all of its stores.

Invariant: what a pattern means does not depend on the order of the stores, and an address means one view.
Exercised by: pytest tests/distill/test_sources.py; `stillhouse train CONFIG --set 'transfer.stores=["a", "b"]'`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.errors import ConfigError, NoStoreError
from ..extract.store import Store, View


def resolve_views(stores: Sequence[Store], patterns: Sequence[str]) -> list[tuple[Store, list[View]]]:
    """Each store with those of its views that some pattern matches, in the patterns' order; TargetReader's `sources`.

    Errors: NoStoreError for a pattern that matches in none of the stores, listing what there is; ConfigError for an
    address that two stores hold.
    """
    found: list[list[View]] = [[] for _ in stores]
    for pattern in patterns:
        failures = []
        for views, store in zip(found, stores, strict=True):
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
    held: dict[str, Store] = {}
    for store, views in zip(stores, found, strict=True):
        for address in dict.fromkeys(view.address for view in views):
            if address in held:
                raise ConfigError(
                    f"{held[address].address} and {store.address} both hold {address}",
                    expected="one view an address",
                    remedy="leave one of the stores out, or extract one of the teachers under another --name",
                )
            held[address] = store
    return [(store, list(dict.fromkeys(views))) for store, views in zip(stores, found, strict=True) if views]
