"""What is wrong with a corpus, said the same way by importers and by `corpus check`.

Invariant: a finding names a place, and says what to do. Exercised by `stillhouse corpus check CORPUS --json`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

_PLACE = re.compile(r"(?P<file>.*):(?P<line>\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """kind: a word to filter by. where: a path, or path:line. id: the utterance, where it is known."""

    kind: str
    where: str
    id: str | None
    what: str
    remedy: str

    def __str__(self) -> str:
        id = f" {self.id}:" if self.id else ""
        return f"{self.where}:{id} {self.what}; {self.remedy}"

    @property
    def file(self) -> str:
        match = _PLACE.fullmatch(self.where)
        return match["file"] if match else self.where

    @property
    def line(self) -> int | None:
        match = _PLACE.fullmatch(self.where)
        return int(match["line"]) if match else None

    def facts(self) -> dict[str, str | int | None]:
        return {**asdict(self), "file": self.file, "line": self.line}
