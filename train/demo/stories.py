"""The demo's stories, written for this project: one sentence a line under a `# Title` line.

Guarantees: no sentence of stories-dev.txt or stories-test.txt is in stories-train.txt. All their words are, several
times each, so that a small recogniser can recognise sentences that are new.
Try: `stillhouse demo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from ...data.errors import CorpusError

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Story:
    """A story, numbered from 1 over all splits."""

    number: int
    split: str
    title: str
    sentences: tuple[str, ...]


def read_stories() -> list[Story]:
    """Return all stories, those of the training first."""
    stories: list[Story] = []
    for split in SPLITS:
        name = f"stories-{split}.txt"
        text = (files(__package__) / name).read_text(encoding="ascii")
        stories += parse_stories(text, split, first=len(stories) + 1, where=name)
    return stories


def parse_stories(text: str, split: str, first: int = 1, where: str = "stories") -> list[Story]:
    """Return the stories of one file. Raises CorpusError for a sentence before the first title."""
    stories: list[tuple[str, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("#"):
            stories.append((line.lstrip("# "), []))
        elif line and not stories:
            raise CorpusError("a sentence before the first title", where=f"{where}:{number}", expected="# Title")
        elif line:
            stories[-1][1].append(line)
    return [Story(first + k, split, title, tuple(lines)) for k, (title, lines) in enumerate(stories)]


def homophones() -> list[tuple[str, ...]]:
    """Return groups of words of the stories that sound alike: only the context tells them apart."""
    text = (files(__package__) / "homophones.txt").read_text(encoding="ascii")
    return [tuple(line.split()) for line in text.splitlines() if line]
