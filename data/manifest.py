"""The manifest, corpus.jsonl: one utterance a line, in order.

Invariant: what read_manifest returns is valid and its ids are unique; whatever is not is a CorpusError that names
file and line. Audio paths are relative to the manifest's folder, so that a corpus can move. Written atomically.
Exercised by `stillhouse corpus info CORPUS`.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import CorpusError
from .files.atomic import draft_of
from .files.lines import parse_object, scan_bytes
from .files.paths import confined

# 30 years: more seconds than that times a rate would leave the integers that libraries count samples with.
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Duration = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class Utterance(BaseModel):
    """One transcribed stretch of speech, or a text alone (audio None)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    text: str
    audio: str | None = None
    start_s: Seconds = 0.0
    duration_s: Duration | None = None
    channel: Annotated[int, Field(ge=0)] | None = None  # None: the mean of all channels
    session: str | None = None
    speaker: str | None = None
    split: str | None = None
    meta: dict[str, str] = {}

    def model_post_init(self, context: object, /) -> None:
        # One set of "fields that were given" for all: their own sets would be half of a large corpus's memory.
        object.__setattr__(self, "__pydantic_fields_set__", _GIVEN)

    @field_validator("id")
    @classmethod
    def _id(cls, value: str) -> str:
        if not value or value != value.strip():
            raise ValueError("an id must not be empty, nor begin or end with white space")
        if not value.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
            raise ValueError("an id must not hold control characters")
        return value

    @field_validator("audio")
    @classmethod
    def _audio(cls, value: str | None) -> str | None:
        if value is not None and (not value or "\0" in value):
            raise ValueError("audio must be a path, or absent for an utterance of text alone")
        return value


_GIVEN = set(Utterance.model_fields)


class Corpus:
    """The utterances of one manifest, in file order. root: the folder that no audio path may leave, if any;
    split: those that were selected, if not all.
    """

    def __init__(
        self, path: Path, utterances: Sequence[Utterance], root: Path | None = None, split: str | None = None
    ) -> None:
        self.path, self.split = Path(path), split
        self.utterances = list(utterances)
        self.root = root

    @cached_property
    def by_id(self) -> dict[str, Utterance]:
        return {u.id: u for u in self.utterances}

    def __len__(self) -> int:
        return len(self.utterances)

    def sessions(self) -> list[list[int]]:
        """Indices of the utterances of each session, in file order; one without session is its own."""
        groups: dict[tuple[bool, str], list[int]] = {}
        for k, u in enumerate(self.utterances):
            key = (True, u.session) if u.session is not None else (False, u.id)
            groups.setdefault(key, []).append(k)
        return list(groups.values())

    def audio_path(self, utterance: Utterance) -> Path:
        if utterance.audio is None:
            raise CorpusError("the utterance is text alone, it has no audio", where=utterance.id)
        return confined(self.path.parent / utterance.audio, self.root)

    def splits(self) -> dict[str | None, int]:
        """How many utterances each split has."""
        return dict(Counter(u.split for u in self.utterances))

    def select(self, split: str | None) -> Corpus:
        """The utterances of a split; "a,b" takes both, None takes all. Raises CorpusError where none match."""
        if split is None:
            return self
        wanted = {name.strip() for name in split.split(",")}
        known = {name for name in self.splits() if name is not None}
        if missing := sorted(wanted - known):
            raise CorpusError(
                f"no utterance has split {', '.join(missing)}",
                where=self.path,
                expected=("one of " + ", ".join(sorted(known))) if known else "a corpus with splits",
                remedy=None if known else f"make them with `stillhouse corpus split {self.path}`",
            )
        return Corpus(self.path, [u for u in self.utterances if u.split in wanted], self.root, split)


def scan_manifest(path: Path | str) -> Iterator[tuple[int, Utterance | CorpusError]]:
    """Every line that is not blank, as (line number, utterance or what is wrong with it)."""
    path = Path(path)
    if not os.path.exists(path):
        raise CorpusError("cannot read the manifest: there is none", where=path, remedy="`stillhouse corpus import`")
    for number, line in scan_bytes(path):
        yield number, line if isinstance(line, CorpusError) else _parse(line, f"{path}:{number}")


class BadLine(CorpusError):
    """A line that is no utterance. id: what it says its id is, as far as that can be read."""

    id: str | None = None


def _parse(line: bytes, where: str) -> Utterance | CorpusError:
    try:
        line.decode("utf-8")
        return Utterance.model_validate_json(line)
    except UnicodeDecodeError as e:
        error = BadLine(
            f"bytes {e.start}–{e.end} of the line are not UTF-8", where=where, remedy="save the manifest as UTF-8"
        )
    except ValidationError as e:
        error = BadLine(describe_validation(e), where=where, expected="one JSON object a line, as `Utterance`")
    fields = parse_object(line.decode("utf-8", "replace"), where)
    if isinstance(fields, dict) and isinstance(fields.get("id"), str):
        error.id = fields["id"]
    return error


def describe_validation(error: ValidationError) -> str:
    """pydantic's findings in one line: field, what is wrong, what was there."""
    parts = []
    for item in error.errors(include_url=False, include_context=False):
        field = ".".join(str(p) for p in item["loc"])
        given = repr(item["input"])
        given = "" if item["type"] in ("missing", "json_invalid") else f" (given {given[:60]})"
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{field}: {message}{given}" if field else f"{message}{given}")
    return "; ".join(parts)


def read_manifest(path: Path | str, root: Path | None = None) -> Corpus:
    """Read corpus.jsonl. Raises CorpusError at the first line that is not an utterance, or that repeats an id.

    root: the folder that no audio path may leave, by "..", as an absolute path or over a link; the first that does is
    an AudioError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "corpus.jsonl"
    utterances: list[Utterance] = []
    seen: dict[str, int] = {}
    for number, found in scan_manifest(path):
        if isinstance(found, CorpusError):
            raise found
        first = seen.setdefault(found.id, number)
        if first != number:
            raise CorpusError(
                f"id {found.id} was used before, on line {first}",
                where=f"{path}:{number}",
                remedy=f"see all of them with `stillhouse corpus check {path}`",
            )
        if root is not None and found.audio is not None:
            confined(path.parent / found.audio, root, f"{path}:{number}: {found.id}")
        utterances.append(found)
    if not utterances:
        raise CorpusError("the manifest is empty", where=path, remedy="make one with `stillhouse corpus import`")
    return Corpus(path, utterances, root)


def write_manifest(path: Path | str, utterances: Iterable[Utterance]) -> None:
    """Write corpus.jsonl whole or not at all. Raises CorpusError when an id is used twice."""
    path = Path(path)
    seen: set[str] = set()
    for u in (utterances := list(utterances)):
        if u.id in seen:
            raise CorpusError("the id is used twice", where=u.id, remedy="give every utterance its own id")
        seen.add(u.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(to_line(u) + "\n" for u in utterances)


def to_line(utterance: Utterance) -> str:
    """The utterance as one line of JSON, without the fields that say nothing."""
    fields = utterance.model_dump()
    default = {"start_s": 0.0, "meta": {}}
    kept = {k: v for k, v in fields.items() if v is not None and (k not in default or v != default[k])}
    return json.dumps(kept, ensure_ascii=False)
