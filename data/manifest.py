"""The manifest, corpus.jsonl: one utterance a line, in order.

Guarantees: the utterances of read_manifest are valid and their ids are unique. Any other line is a CorpusError that
names file and line. Audio paths are relative to the manifest's folder, so that you can move a corpus.
Try: `stillhouse corpus info corpus.jsonl`.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import CorpusError
from .files.atomic import draft_of
from .files.lines import opens_array, parse_object, scan_bytes
from .files.paths import confined

# 30 years. With more seconds, samples would not fit into the integers of audio libraries.
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Duration = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class Utterance(BaseModel):
    """One transcribed segment of speech, or a text without audio.

    Fields:
        id: unique in the corpus, without control characters.
        text: the raw transcript.
        audio: a path relative to the manifest's folder, or None.
        start_s, duration_s: the segment of the file in seconds. A duration of None reaches to the end.
        channel: from 0. None: the mean of all channels.
        session: utterances of one session are context of each other, in file order. None: no session.
        meta: other columns, as texts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    text: str
    audio: str | None = None
    start_s: Seconds = 0.0
    duration_s: Duration | None = None
    channel: Annotated[int, Field(ge=0)] | None = None
    session: str | None = None
    speaker: str | None = None
    split: str | None = None
    meta: dict[str, str] = {}

    def model_post_init(self, context: object, /) -> None:
        # All utterances share one set of given fields. Separate sets would be half of the memory of a large corpus.
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
            raise ValueError("audio must be a path, or absent for a text without audio")
        return value


_GIVEN = set(Utterance.model_fields)


class Corpus:
    """The utterances of one manifest, in file order.

    Arguments:
        path: the manifest.
        utterances: its utterances.
        root: the folder that no audio path may leave, or None.
        split: the splits that were selected, or None for all.
    """

    def __init__(
        self, path: Path, utterances: Sequence[Utterance], root: Path | None = None, split: str | None = None
    ) -> None:
        self.path, self.split = Path(path), split
        self.utterances = list(utterances)
        self.root = root

    @cached_property
    def by_id(self) -> dict[str, Utterance]:
        """The utterances by their ids."""
        return {u.id: u for u in self.utterances}

    def __len__(self) -> int:
        return len(self.utterances)

    def sessions(self) -> list[list[int]]:
        """Return the indices of the utterances of each session, in file order. Without a session, each is alone."""
        groups: dict[tuple[bool, str], list[int]] = {}
        for k, u in enumerate(self.utterances):
            key = (True, u.session) if u.session is not None else (False, u.id)
            groups.setdefault(key, []).append(k)
        return list(groups.values())

    def audio_path(self, utterance: Utterance) -> Path:
        """Return the path of an utterance's audio.

        Raises:
            CorpusError: the utterance has no audio.
            AudioError: the path leaves the root.
        """
        if utterance.audio is None:
            raise CorpusError("the utterance has no audio", where=utterance.id)
        return confined(self.path.parent / utterance.audio, self.root)

    def splits(self) -> dict[str | None, int]:
        """Return how many utterances each split has."""
        return dict(Counter(u.split for u in self.utterances))

    def select(self, split: str | None) -> Corpus:
        """Return the corpus of a split. "a,b" selects both, None all. Raises CorpusError for an unknown split."""
        if split is None:
            return self
        names = {name.strip() for name in split.split(",")}
        known = {name for name in self.splits() if name is not None}
        if missing := sorted(names - known):
            what = f"no utterance has split {', '.join(missing)}"
            expected = ("one of " + ", ".join(sorted(known))) if known else "a corpus with splits"
            remedy = None if known else f"make them with `stillhouse corpus split {self.path}`"
            raise CorpusError(what, where=self.path, expected=expected, remedy=remedy)
        return Corpus(self.path, [u for u in self.utterances if u.split in names], self.root, split)


def scan_manifest(path: Path | str) -> Iterator[tuple[int, Utterance | CorpusError]]:
    """Yield (line number, utterance or its error) of every line that is not blank."""
    path = Path(path)
    if not os.path.exists(path):
        raise CorpusError("there is no such manifest", where=path, remedy="make one with `stillhouse corpus import`")
    for number, line in scan_bytes(path):
        if line.startswith(b"[") and opens_array(line.decode("utf-8", "replace")):
            remedy = f"write one object a line: jq -c '.[]' {path} > corpus.jsonl"
            where, expected = f"{path}:{number}", "one JSON object a line"
            yield number, CorpusError("a JSON array begins here", where=where, expected=expected, remedy=remedy)
            return
        yield number, _parse(line, f"{path}:{number}")


class BadLine(CorpusError):
    """A line is not an utterance. `id` is its id, if that can be read."""

    id: str | None = None


def _parse(line: bytes, where: str) -> Utterance | CorpusError:
    try:
        line.decode("utf-8")
        return Utterance.model_validate_json(line)
    except UnicodeDecodeError as e:
        what = f"bytes {e.start}–{e.end} of the line are not UTF-8"
        error = BadLine(what, where=where, remedy="save the manifest as UTF-8")
    except ValidationError as e:
        error = BadLine(describe_validation(e), where=where, expected="one JSON object a line, as `Utterance`")
    fields = parse_object(line.decode("utf-8", "replace"), where)
    if isinstance(fields, dict) and isinstance(fields.get("id"), str):
        error.id = fields["id"]
    return error


def describe_validation(error: ValidationError) -> str:
    """Return the errors of pydantic in one line: field, what is wrong, the given value."""
    parts = []
    for item in error.errors(include_url=False, include_context=False):
        field = ".".join(str(p) for p in item["loc"])
        given = repr(item["input"])
        given = "" if item["type"] in ("missing", "json_invalid") else f" (given {given[:60]})"
        message = item["msg"].removeprefix("Value error, ")
        parts.append(f"{field}: {message}{given}" if field else f"{message}{given}")
    return "; ".join(parts)


def is_manifest(head: bytes) -> bool:
    """Return whether a file begins like a manifest, with the id of an utterance, and not with a hypothesis."""
    return re.match(rb'\s*\{\s*"id"\s*:(?!.*"hyp"\s*:)', head.split(b"\n")[0]) is not None


def read_manifest(path: Path | str, root: Path | None = None) -> Corpus:
    """Read corpus.jsonl.

    Arguments:
        path: the manifest, or its folder.
        root: the folder that no audio path may leave, by "..", as an absolute path or over a link.

    Raises:
        CorpusError: a line is not an utterance or repeats an id, or there is no line.
        AudioError: a path leaves the root.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "corpus.jsonl"
    utterances: list[Utterance] = []
    seen: dict[str, int] = {}
    for number, line in scan_manifest(path):
        if isinstance(line, CorpusError):
            raise line
        first = seen.setdefault(line.id, number)
        if first != number:
            remedy = f"see all of them with `stillhouse corpus check {path}`"
            raise CorpusError(f"id {line.id} was used before, on line {first}", where=f"{path}:{number}", remedy=remedy)
        if root is not None and line.audio is not None:
            confined(path.parent / line.audio, root, f"{path}:{number}: {line.id}")
        utterances.append(line)
    if not utterances:
        raise CorpusError("the manifest is empty", where=path, remedy="make one with `stillhouse corpus import`")
    return Corpus(path, utterances, root)


def write_manifest(path: Path | str, utterances: Iterable[Utterance]) -> None:
    """Write corpus.jsonl, whole or not at all. Raises CorpusError if an id is used twice."""
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
    """Return the utterance as one line of JSON, without fields that have their default."""
    return json.dumps(utterance.model_dump(exclude_defaults=True), ensure_ascii=False)
