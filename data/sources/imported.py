"""What all importers share: the result with its findings, sessions read off ids, the order inside a session.

Invariant: an id is imported once; the second use is a finding that names both places. Exercised by
`stillhouse corpus import`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, CorpusError, UsageError
from ..findings import Finding
from ..manifest import Utterance, describe_validation


@dataclass
class Imported:
    """The utterances of an import, in order, what could not be imported, and what is worth knowing about it."""

    utterances: list[Utterance] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    orders: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, utterance: Utterance, order: str, where: str) -> None:
        if utterance.id in self.places:
            first = self.places[utterance.id]
            self.finding(
                "duplicate-id", where, f"the id was used before, at {first}", utterance.id, "give it another id"
            )
            return
        self.places[utterance.id] = where
        if order:
            self.orders[utterance.id] = order
        self.utterances.append(utterance)

    def make(self, where: str, order: str = "", **fields: Any) -> None:
        """Add an utterance of these fields, or the finding that says why they are none."""
        for name in ("session", "speaker", "split"):
            if isinstance(value := fields.get(name), str):
                fields[name] = sys.intern(value)  # one string for all that share it
        try:
            utterance = Utterance(**fields)
        except ValidationError as e:
            id = fields.get("id")
            self.finding("line", where, describe_validation(e), id if isinstance(id, str) else None)
        else:
            self.add(utterance, order, where)

    def finding(
        self, kind: str, where: object, what: str, id: str | None = None, remedy: str = "mend or delete the line"
    ) -> None:
        self.findings.append(Finding(kind, str(where), id or None, what, remedy))

    def error(self, kind: str, where: str, error: CorpusError, id: str | None = None) -> None:
        """An error that one line met, as a finding at that line."""
        said = error.what if error.where is None or str(error.where) == where else f"{error.where}: {error.what}"
        said += f" (expected {error.expected})" if error.expected else ""
        self.finding(kind, where, said, id, error.remedy or "mend or delete the line")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def named_sources(sources: Sequence[str]) -> list[tuple[str | None, Path]]:
    """[SPLIT=]PATH… as (split or None, path). Raises UsageError for what is not there, ConfigError for no split."""
    found = []
    for text in sources:
        split, _, rest = text.partition("=")
        named = bool(rest) and not Path(text).exists()
        path = Path(rest if named else text)
        if not path.exists():
            raise UsageError("no such file or folder", where=path, expected="[SPLIT=]PATH")
        if named and not split:
            raise ConfigError("a split without a name", where=text, expected="SPLIT=PATH")
        found.append((split if named else None, path))
    return found


class SessionPattern:
    """A regular expression on the id, with a named group `session` and, if wanted, `order`."""

    def __init__(self, pattern: str) -> None:
        try:
            self._regex = re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"the pattern is not a regular expression: {e}", where=pattern) from e
        if "session" not in self._regex.groupindex:
            raise ConfigError(
                "the pattern has no group `session`",
                where=pattern,
                expected=r"something like (?P<session>\d+-\d+)-(?P<order>\d+)",
            )

    def read(self, id: str, session: str | None = None, order: str = "") -> tuple[str | None, str]:
        """(session, order) of an id; CorpusError where the pattern does not match all of it."""
        match = self._regex.fullmatch(id)
        if match is None:
            raise CorpusError(f"the session pattern {self._regex.pattern} does not match the id")
        groups = match.groupdict()
        return groups["session"] or session, groups.get("order") or order


def natural(text: str) -> tuple:
    """A sort key under which a2 comes before a10."""
    parts = re.split(r"(\d{1,4000})", text)  # Python reads no longer integers
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p)


def by_time(start_s: float) -> str:
    """A start as an order inside a session."""
    return str(round(start_s * 1e6))


def in_session_order(result: Imported) -> list[Utterance]:
    """Sessions where their first utterance was, each together and in its order; without orders, as they came."""
    first: dict[str, int] = {}
    for k, u in enumerate(result.utterances):
        if u.session is not None:
            first.setdefault(u.session, k)
    orders = result.orders

    def key(item: tuple[int, Utterance]) -> tuple:
        k, u = item
        return (k if u.session is None else first[u.session], natural(orders.get(u.id, "")), k)

    return [u for _, u in sorted(enumerate(result.utterances), key=key)]
