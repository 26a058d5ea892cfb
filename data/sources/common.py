"""What all importers share: the result with its findings, sessions read off ids, the order inside a session.

Invariant: an id is imported once; the second use is a finding that names both places. Exercised by
`stillhouse corpus import`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from ..audio.read import SLACK_S
from ..corpus.check import Finding
from ..errors import AudioError, ConfigError, CorpusError, UsageError
from ..manifest import Utterance, describe_validation

OVERSHOOT_S = 0.5  # that much of a segment's end may lie behind its recording; cut off, as Kaldi does


class SegmentError(CorpusError):
    """A segment that is not inside its recording."""


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

    def refused(self, where: str, error: CorpusError, id: str | None = None) -> None:
        """An utterance that is left out for its audio, its segment, or anything else of its line."""
        kinds = {AudioError: "audio", SegmentError: "segment"}
        self.error(next((kind for of, kind in kinds.items() if isinstance(error, of)), "line"), where, error, id)

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
            raise CorpusError(
                f"the session pattern {self._regex.pattern} does not match the whole id",
                remedy="change the pattern, or mend or delete the line",
            )
        groups = match.groupdict()
        return groups["session"] or session, groups.get("order") or order


def natural(text: str) -> tuple:
    """A sort key under which a2 comes before a10."""
    parts = re.split(r"(\d{1,4000})", text)  # Python reads no longer integers
    return tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p)


def by_time(start_s: float) -> str:
    """A start as an order inside a session."""
    return str(round(start_s * 1e6))


def is_seconds(value: Any) -> TypeGuard[float]:
    """Whether a value out of JSON can be a time."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def inside(begin: float, end: float, seconds: float, path: Path, result: Imported) -> float:
    """The length of a stretch inside its recording; SegmentError where it leaves it."""
    if not 0 <= begin < end or begin >= seconds or end > seconds + OVERSHOOT_S:
        raise SegmentError(
            f"the segment {begin:g}–{end:g} s leaves {path}, {seconds:.3f} s long", remedy="mend or delete the line"
        )
    if end > seconds + SLACK_S:
        result.note(f"segments that end up to {OVERSHOOT_S} s behind their recording end with it")
    return round(min(end, seconds) - begin, 6)


def meta_of(fields: Mapping[str, Any], taken: Container[str], result: Imported, prefix: str = "") -> dict[str, str]:
    """What no field of an utterance takes, as texts; lists and objects are left out, with a note."""
    meta = {}
    for name, value in fields.items():
        if name in taken or value is None:
            continue
        if isinstance(value, (str, int, float)):
            meta[name] = value if isinstance(value, str) else json.dumps(value)
        else:
            result.note(f"{prefix}{name} is left out: no text or number")
    return meta


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
