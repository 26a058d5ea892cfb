"""The demo's stories: written for this project, in order, one sentence a line under a `# Title` line.

Invariant: no sentence of stories-dev.txt or stories-test.txt is in stories-train.txt; all their words are,
several times each (a test holds it), so that a small recogniser can be asked for sentences that are new.
Run: `stillhouse demo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from ...data.errors import CorpusError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Story:
    number: int  # from 1, over all splits
    split: str  # one of SPLITS: who may hear it
    title: str
    sentences: tuple[str, ...]


def read_stories() -> list[Story]:
    """All stories, those of the training first, numbered through."""
    stories: list[Story] = []
    for split in SPLITS:
        name = f"stories-{split}.txt"
        text = (files(__package__) / name).read_text(encoding="ascii")
        stories += parse_stories(text, split, first=len(stories) + 1, where=name)
    return stories


def parse_stories(text: str, split: str, first: int = 1, where: str = "stories") -> list[Story]:
    """Stories of one file; raises CorpusError for a sentence before the first title."""
    found: list[tuple[str, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("#"):
            found.append((line.lstrip("# "), []))
        elif line and not found:
            raise CorpusError("a sentence before the first title", where=f"{where}:{number}", expected="# Title")
        elif line:
            found[-1][1].append(line)
    return [Story(first + k, split, title, tuple(lines)) for k, (title, lines) in enumerate(found)]


def homophones() -> list[tuple[str, ...]]:
    """Groups of words of the stories that sound alike: where only the context decides."""
    text = (files(__package__) / "homophones.txt").read_text(encoding="ascii")
    return [tuple(line.split()) for line in text.splitlines() if line]
