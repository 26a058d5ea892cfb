"""Fixtures of the store whose states are known."""

from known_store import known, partial, stillhouse, store

__all__ = ["known", "partial", "stillhouse", "store"]
