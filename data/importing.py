"""What all importers share: the result with its problems, sessions read off ids, the order inside a session.

Invariant: an id is imported once; the second use is a problem that names both places. Exercised by
`stillhouse corpus import`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import ConfigError, CorpusError
from .manifest import Utterance


@dataclass(frozen=True)
class Problem:
    where: str
    what: str
    id: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" (utterance {self.id})" if self.id else "")


@dataclass
class Imported:
    """The utterances of an import, in order, and what could not be imported."""

    utterances: list[Utterance] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    orders: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, utterance: Utterance, order: str, where: str) -> None:
        if utterance.id in self.places:
            self.problem(where, f"the id was used before, at {self.places[utterance.id]}", utterance.id)
            return
        self.places[utterance.id] = where
        self.orders[utterance.id] = order
        self.utterances.append(utterance)

    def problem(self, where: str, what: str, id: str | None = None) -> None:
        self.problems.append(Problem(where, what, id or None))


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
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", text) if p)


def in_session_order(result: Imported) -> list[Utterance]:
    """Sessions where their first utterance was, each together and in its order; without orders, as they came."""
    first: dict[str, int] = {}
    for k, u in enumerate(result.utterances):
        first.setdefault(u.session if u.session is not None else f"\0{k}", k)

    def key(item: tuple[int, Utterance]) -> tuple:
        k, u = item
        place = first[u.session] if u.session is not None else k
        return place, natural(result.orders.get(u.id, "")), k

    return [u for _, u in sorted(enumerate(result.utterances), key=key)]
